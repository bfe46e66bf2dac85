"""Ranks connected after loading, on fakes: who is asked for which way, what is done without, and in which order all is let go."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nccl import FakeNccl

from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime import connections
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.connections import connected
from moecompiler.runtime.threads import run_in_threads
from moecompiler.runtime.ways import NCCL_LEAST, Asked, Endpoint

pytestmark = pytest.mark.timeout(60)
SMALL = 100


class Session:
    """That of a GPU; ``log`` hears when it is closed."""

    collective_kernels = SimpleNamespace()

    def __init__(self, log: list[str]):
        self._log = log

    def close(self) -> None:
        self._log.append("session")


class FakeIpc:
    """Serves the groups it was made for."""

    name, capturable = "ipc", True

    def __init__(self, groups: list[tuple[int, ...]], log: list[str]):
        self._groups, self._log = groups, log

    def takes(self, nbytes: int, group: tuple[int, ...]) -> bool:
        return group in self._groups

    def leave(self) -> None:
        self._log.append("left")

    def close(self) -> None:
        self._log.append("ipc")


class Node:
    """What ranks, as threads, find: which GPU each has on which host, and libraries that work, or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hosts: str, gpus: str, ipc: bool = True, nccl: Any = None):
        self.log: list[str] = []
        self.library = nccl or FakeNccl()
        reaches = frozenset(gpus)
        ends = [
            Endpoint(rank, host, 100 + rank, gpu, reaches)
            for rank, (host, gpu) in enumerate(zip(hosts, gpus, strict=True))
        ]

        def connect_ipc(communicator: Communicator, groups: Any, kernels: Any) -> tuple[FakeIpc | None, str]:
            communicator.gather_objects(groups)
            return (FakeIpc(groups, self.log), "") if ipc else (None, "CUDA: it is forbidden")

        monkeypatch.setattr(connections, "gather_endpoints", lambda communicator, no_ipc: ends)
        monkeypatch.setattr(connections.ipc, "connect", connect_ipc)
        monkeypatch.setattr(connections, "load_nccl", lambda: self.library)

    def ways(self, mapping: Mapping, asked: Asked = Asked.auto) -> tuple[list[tuple[str, str, bool]], list[str]]:
        """For each rank the ways of a small and of a large message, and whether there is a link; and what rank 0 says."""

        def run(communicator: Communicator) -> tuple[tuple[str, str, bool], list[str]]:
            group = mapping.tp_group(communicator.rank)
            with connected(asked, communicator, mapping, Session(self.log)) as words:
                ways = communicator.device
                assert ways is not None
                names = [ways.way(nbytes, group).name for nbytes in (SMALL, NCCL_LEAST)]
                found = (*names, ways.link is not None)
            assert communicator.device is None
            return found, words

        said = run_in_threads(mapping.world_size, run)
        assert all(words == said[0][1] for _, words in said)
        return [found for found, _ in said], said[0][1]


TP2, PP2, TP2_PP2 = Mapping.create(2), Mapping.create(1, 2), Mapping.create(2, 2)


def test_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(monkeypatch, "aaaa", "0123")
    found, words = node.ways(TP2_PP2)
    assert found == [("ipc", "nccl", True)] * 4
    assert words == [
        "collectives: ipc (one host, and GPUs that reach each other), from 8 MiB on nccl (a large message); ranks 0,1 2,3",
        "from stage to stage: nccl (each stage has a GPU); ranks 0,2 1,3",
    ]
    assert len(node.library.aborted) == 8


def test_ranks_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(monkeypatch, "aaaa", "0000")
    assert node.ways(TP2_PP2)[0] == [("ipc", "ipc", False)] * 4
    assert not node.library.members


def test_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of one host each; and one stage over both."""
    assert Node(monkeypatch, "aabb", "0101").ways(TP2_PP2)[0] == [("ipc", "nccl", True)] * 4
    found, words = Node(monkeypatch, "ab", "01").ways(TP2)
    assert found == [("nccl", "nccl", False)] * 2
    assert words == ["collectives: nccl (no CUDA IPC: ranks 0 and 1 are on two hosts); ranks 0,1"]


def test_what_does_not_work_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Node(monkeypatch, "aa", "01", ipc=False).ways(TP2)[0] == [("nccl", "nccl", False)] * 2
    broken = FakeNccl({"ncclCommInitRank": 2})
    assert Node(monkeypatch, "aa", "01", nccl=broken).ways(TP2)[0] == [("ipc", "ipc", False)] * 2
    found, words = Node(monkeypatch, "aa", "01", ipc=False, nccl=broken).ways(TP2)
    assert found == [("host", "host", False)] * 2
    assert "CUDA: it is forbidden; no NCCL: rank 1: NCCL failed in ncclCommInitRank" in words[0]
    assert Node(monkeypatch, "aa", "01", nccl=broken).ways(PP2)[0] == [("host", "host", False)] * 2


@pytest.mark.parametrize("asked", [Asked.ipc, Asked.nccl])
def test_what_is_insisted_on(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = Node(monkeypatch, "aa", "01").ways(TP2, asked)
    assert found == [(asked.value, asked.value, False)] * 2
    broken = Node(monkeypatch, "aa", "01", ipc=False, nccl=FakeNccl({"ncclCommInitRank": 2}))
    with pytest.raises(
        UserError, match="CUDA: it is forbidden" if asked is Asked.ipc else "NCCL failed in ncclCommInit"
    ):
        broken.ways(TP2, asked)


def test_what_uses_something_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks let go of each other's memory, then sessions with their graphs, then what graphs have called; where a rank
    fails, nobody is waited for."""
    node = Node(monkeypatch, "aa", "01")
    node.ways(TP2)
    assert node.log.index("left") < node.log.index("session") < node.log.index("ipc")

    node.log.clear()
    met = threading.Barrier(2)

    def fail(communicator: Communicator) -> None:
        with connected(Asked.auto, communicator, TP2, Session(node.log)):
            met.wait()
            raise UserError("something else")

    with pytest.raises(UserError, match="something else"):
        run_in_threads(2, fail)
    assert sorted(node.log) == ["ipc", "ipc", "session", "session"]


def test_ranks_on_the_cpu_and_one_alone() -> None:
    def run(communicator: Communicator) -> list[str]:
        mapping = Mapping.create(pp_size=communicator.world_size)
        with connected(Asked.auto, communicator, mapping, object()) as words:
            return words

    assert run_in_threads(2, run)[1] == ["from stage to stage: host (threads of one process, on the CPU); ranks 0,1"]
    assert run_in_threads(1, run)[0] == []
