"""What is made of NCCL's calls, on a library of threads: groups that meet, sums, rows side by side, letters, errors in words."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_gpu import FakeDriver
from fake_nccl import FakeNccl

from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime import device, nccl, nccl_library
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.nccl import NcclCommunicator, connect_nccl
from moecompiler.runtime.nccl_library import UniqueId, load_nccl, nccl_version
from moecompiler.runtime.threads import run_in_threads

pytestmark = pytest.mark.timeout(60)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class Driver(FakeDriver):
    """Copies of two dimensions, done at once."""

    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
    CUDA_MEMCPY2D = SimpleNamespace

    def cuMemcpy2DAsync(self, copy: Any, stream: int) -> tuple[int]:
        assert copy.srcMemoryType == copy.dstMemoryType == 2
        for row in range(copy.Height):
            source, target = copy.srcDevice + row * copy.srcPitch, copy.dstDevice + row * copy.dstPitch
            ctypes.memmove(target, source, copy.WidthInBytes)
        return (0,)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    for module in (device, nccl):
        monkeypatch.setattr(module, "driver", lambda: driver)
    return driver


def groups_of(mapping: Mapping, rank: int) -> list[tuple[int, ...]]:
    column = tuple(range(mapping.tp_rank(rank), mapping.world_size, mapping.tp_size))
    return [mapping.tp_group(rank), column]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapping", [Mapping.create(2), Mapping.create(3), Mapping.create(2, 2)], ids=str)
def test_what_groups_exchange(mapping: Mapping, dtype: str) -> None:
    """Each stage by itself: sums, and rows of every rank side by side, one row and several, small rooms and larger ones."""
    library, shapes = FakeNccl(), [(1, 5), (3, 4), (2, 2), (4, 7)]

    def run(communicator: Communicator) -> list[np.ndarray]:
        rank, group = communicator.rank, mapping.tp_group(communicator.rank)
        ways = connect_nccl(library, communicator, groups_of(mapping, rank))
        assert ways.capturable
        assert ways.takes(1, group)
        rng, results = np.random.default_rng(rank), []
        for rows, columns in shapes:
            x = rng.standard_normal((rows, columns)).astype(DTYPES[dtype])
            total, side_by_side = np.zeros_like(x), np.zeros((rows, columns * len(group)), x.dtype)
            ways.all_reduce(x.ctypes.data, total.ctypes.data, x.size, dtype, group, 7)
            ways.all_gather(x.ctypes.data, side_by_side.ctypes.data, rows, columns, dtype, group, 7)
            results += [x, total, side_by_side]
        ways.check()
        ways.close()
        return results

    said = run_in_threads(mapping.world_size, run)
    assert len(library.aborted) == len(library.members)
    for rank, results in enumerate(said):
        peers = [said[peer] for peer in mapping.tp_group(rank)]
        for at in range(0, len(results), 3):
            parts = [peer[at] for peer in peers]
            np.testing.assert_array_equal(results[at + 1], sum(parts[1:], parts[0]))
            np.testing.assert_array_equal(results[at + 2], np.concatenate(parts, axis=-1))


def test_stages_send_to_one_another() -> None:
    """Down each column of tp2·pp3, in the order in which it is sent."""
    library, mapping = FakeNccl(), Mapping.create(2, 3)

    def run(communicator: Communicator) -> list[list[float]]:
        rank, next_stage = communicator.rank, mapping.tp_size
        link = connect_nccl(library, communicator, groups_of(mapping, rank))
        said = []
        for turn in range(3):
            x = np.array([rank, 10.0 * turn])
            if not mapping.is_first_stage(rank):
                link.receive(x.ctypes.data, x.nbytes, rank - next_stage, 7)
            said.append(x.tolist())
            if not mapping.is_last_stage(rank):
                link.send(x.ctypes.data, x.nbytes, rank + next_stage, 7)
        return said

    for rank, said in enumerate(run_in_threads(6, run)):
        assert said == [[rank % 2, 10.0 * turn] for turn in range(3)]


def test_small_messages_are_left_to_others() -> None:
    ways = NcclCommunicator(FakeNccl(), 0, {(0, 1): 5}, least=100)
    assert [ways.takes(nbytes, (0, 1)) for nbytes in (99, 100)] == [False, True]
    assert not ways.takes(1000, (0, 2))
    with pytest.raises(ValueError, match="rank 0 has no connection to rank 3"):
        ways.send(0, 1, 3, 7)


@pytest.mark.parametrize("function", ["ncclGetUniqueId", "ncclCommInitRank"])
def test_ranks_that_cannot_be_connected(function: str) -> None:
    """All ranks say why, and those that were connected let go."""
    library = FakeNccl({function: 2})

    def run(communicator: Communicator) -> str:
        with pytest.raises(UserError) as caught:
            connect_nccl(library, communicator, [(0, 1), (communicator.rank,)])
        return str(caught.value)

    first, second = run_in_threads(2, run)
    assert first == second
    assert f"NCCL failed in {function} (unhandled system error): connect to 10.0.0.7 refused; NCCL_DEBUG=INFO" in first
    assert "--collectives ipc or host" in first
    assert "\n" not in first
    assert len(library.aborted) == (1 if function == "ncclCommInitRank" else 0)


def test_a_call_that_fails() -> None:
    ways = NcclCommunicator(FakeNccl({"ncclAllReduce": 6}), 0, {(0, 1): 5})
    with pytest.raises(UserError, match=r"NCCL failed in ncclAllReduce \(remote process exited"):
        ways.all_reduce(0, 0, 1, "float16", (0, 1), 7)


def test_a_connection_that_has_broken() -> None:
    library = FakeNccl()
    ways = NcclCommunicator(library, 0, {(0, 1): 5})
    ways.check()
    library.broken = 6
    with pytest.raises(UserError, match=r"NCCL failed in what ranks \(0, 1\) exchange \(remote process exited"):
        ways.check()


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_library, "_in_wheel", lambda: None)
    monkeypatch.setattr(nccl_library, "_LIBRARY", "libnccl-that-is-nowhere.so")
    with pytest.raises(
        UserError, match=r"^NCCL cannot be used \(libnccl-that-is-nowhere.so: .*pip install nvidia-nccl"
    ):
        load_nccl()


def test_the_library_itself() -> None:
    """Where it is installed: functions have the types that they are called with, and errors their words."""
    try:
        library = load_nccl()
    except UserError as error:
        pytest.skip(str(error))
    assert int(nccl_version(library).split(".")[0]) == 2
    unique = UniqueId()
    if not library.ncclGetUniqueId(ctypes.byref(unique)):  # it needs a network interface
        assert any(bytes(unique))
        assert bytes(UniqueId.of(bytes(unique))) == bytes(unique)
    assert library.ncclGetErrorString(4).startswith(b"invalid argument")
    with pytest.raises(UserError, match=r"NCCL failed in ncclAllReduce \(invalid argument"):
        nccl_library.call(library, "ncclAllReduce", 0, 0, 1, 7, 0, None, None)
