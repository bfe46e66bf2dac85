"""The choice of ways, as a table, and what it is made from."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from moecompiler.errors import UserError
from moecompiler.runtime import endpoints
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.endpoints import gather_endpoints
from moecompiler.runtime.threads import run_in_threads
from moecompiler.runtime.ways import NCCL_LEAST, Asked, Endpoint, choose_link, choose_way

SMALL, LARGE = 8192, NCCL_LEAST
ALL = frozenset({"gpu0", "gpu1"})


def pair(**second: Any) -> list[Endpoint]:
    """Two processes of one host, each with its GPU; the second one otherwise as said."""
    first = Endpoint(0, "a", 100, "gpu0", ALL)
    return [first, Endpoint(**({"rank": 1, "host": "a", "process": 101, "gpu": "gpu1", "reaches": ALL} | second))]


SETTINGS = {
    "two GPUs": pair(),
    "one GPU": pair(gpu="gpu0"),
    "two hosts": pair(host="b"),
    "no access": pair(reaches=frozenset({"gpu1"})),
    "no NCCL": pair(no_nccl="NCCL cannot be used"),
    "nothing": pair(host="b", no_nccl="NCCL cannot be used"),
    "threads": pair(process=100),
    "no kernels": pair(no_ipc="the engine has no kernels for it"),
    "CPU": [Endpoint(0, "a", 100), Endpoint(1, "a", 101)],
    "threads, CPU": [Endpoint(0, "a", 100), Endpoint(1, "a", 100)],
}
TABLE = [
    ("two GPUs", "auto", SMALL, "ipc", "one host, and GPUs that reach each other"),
    ("two GPUs", "auto", LARGE, "nccl", "a large message"),
    ("two GPUs", "ipc", LARGE, "ipc", "--collectives ipc"),
    ("two GPUs", "nccl", SMALL, "nccl", "--collectives nccl"),
    ("two GPUs", "host", SMALL, "host", "MPI, --collectives host"),
    ("one GPU", "auto", SMALL, "ipc", "ranks share one GPU"),
    ("one GPU", "auto", LARGE, "ipc", "no NCCL: NCCL takes one rank of each GPU, and ranks 0 and 1 share gpu0 of a"),
    ("two hosts", "auto", SMALL, "nccl", "no CUDA IPC: ranks 0 and 1 are on two hosts"),
    ("two hosts", "auto", LARGE, "nccl", "two hosts"),
    ("no access", "auto", SMALL, "nccl", "no CUDA IPC: the GPU of rank 1 does not reach that of rank 0"),
    ("no NCCL", "auto", LARGE, "ipc", "no NCCL: NCCL cannot be used"),
    ("nothing", "auto", SMALL, "host", "no CUDA IPC: ranks 0 and 1 are on two hosts; no NCCL: NCCL cannot be used"),
    ("threads", "auto", SMALL, "ipc", "threads of one process"),
    ("threads", "auto", LARGE, "ipc", "no NCCL: ranks are threads of one process"),
    ("no kernels", "auto", SMALL, "nccl", "no CUDA IPC: the engine has no kernels for it"),
    ("CPU", "auto", LARGE, "host", "MPI, on the CPU"),
    ("threads, CPU", "auto", SMALL, "host", "threads of one process, on the CPU"),
]
LINKS = [
    ("two GPUs", "auto", "nccl"),
    ("two GPUs", "ipc", "nccl"),
    ("two GPUs", "host", "host"),
    ("two hosts", "auto", "nccl"),
    ("one GPU", "auto", "host"),
    ("threads", "auto", "host"),
    ("nothing", "auto", "host"),
    ("CPU", "auto", "host"),
]


@pytest.mark.parametrize(("setting", "asked", "nbytes", "name", "why"), TABLE)
def test_choice(setting: str, asked: str, nbytes: int, name: str, why: str) -> None:
    way = choose_way(Asked(asked), SETTINGS[setting], nbytes)
    assert way.name == name
    assert why in way.why
    if name != "host" or asked != "host":  # whoever is asked gives the same answer
        assert choose_way(Asked(asked), SETTINGS[setting][::-1], nbytes).name == name


@pytest.mark.parametrize(("setting", "asked", "name"), LINKS)
def test_between_stages(setting: str, asked: str, name: str) -> None:
    assert choose_link(Asked(asked), SETTINGS[setting]).name == name


@pytest.mark.parametrize(
    ("setting", "asked", "message"),
    [
        ("two hosts", "ipc", "--collectives ipc: ranks 0 and 1 are on two hosts; give --collectives auto"),
        ("one GPU", "nccl", "--collectives nccl: NCCL takes one rank of each GPU, and ranks 0 and 1 share gpu0 of a"),
        ("nothing", "nccl", "--collectives nccl: NCCL cannot be used"),
        ("CPU", "ipc", "--collectives ipc: these engines run on the CPU; leave it out"),
    ],
)
def test_what_is_insisted_on_and_not_there(setting: str, asked: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_way(Asked(asked), SETTINGS[setting], SMALL)


def test_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of a host with three GPUs, the second of which does not reach the first's; a process may not see every GPU."""
    bus = {0: b"0000:3B:00.0\0\0", 1: b"0000:5E:00.0\0\0"}
    numbers = {each.split(b"\0")[0].lower(): number for number, each in bus.items()}
    monkeypatch.setattr(endpoints, "load_nccl", _absent)

    def run(communicator: Communicator) -> list[Endpoint]:
        return gather_endpoints(communicator, "no kernels" if communicator.rank else None)

    current = {f"rank {rank}": rank for rank in (0, 1)}
    driver = SimpleNamespace(
        cuCtxGetDevice=lambda: (0, current[_thread()]),
        cuDeviceGetPCIBusId=lambda length, number: (0, bus[number]),
        cuDeviceGetByPCIBusId=lambda text: (0, numbers[text]) if _thread() == "rank 1" else (101, 0),
        cuDeviceCanAccessPeer=lambda number, other: (0, 0),
    )
    monkeypatch.setattr(endpoints, "driver", lambda: driver)
    said = run_in_threads(2, run)
    assert said[0] == said[1]
    first, second = said[0]
    assert (first.gpu, second.gpu) == ("0000:3b:00.0", "0000:5e:00.0")
    assert (first.reaches, second.reaches) == ({"0000:3b:00.0"}, {"0000:5e:00.0"})
    assert (first.process, first.no_nccl) == (os.getpid(), "there is no NCCL")
    assert (first.no_ipc, second.no_ipc) == (None, "no kernels")
    assert choose_way(Asked.auto, said[0], SMALL).name == "host"


def _thread() -> str:
    import threading

    return threading.current_thread().name


def _absent() -> Any:
    raise UserError("there is no NCCL")
