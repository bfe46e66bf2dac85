"""NCCL between GPUs of this machine, one process each: numbers as numpy's, also from a CUDA graph; and two ranks on one GPU."""

from __future__ import annotations

import os

import numpy as np
import pytest

from moecompiler.runtime.communicator import Communicator, add_in_rank_order
from moecompiler.runtime.device import Buffer, Device, Stream, checked, driver
from moecompiler.runtime.endpoints import gather_endpoints
from moecompiler.runtime.nccl import NcclCommunicator, connect_nccl
from moecompiler.runtime.nccl_library import load_nccl, nccl_version
from moecompiler.runtime.ways import nccl_refusal
from moecompiler.tools.spawned_ranks import results, run_spawned
from moecompiler.weights import NUMPY_DTYPES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
ELEMENTS = (1, 7, 4096, 8 * 4096 + 5, 700_001, 9_000_001)
SHAPES = ((1, 16_000), (3, 7), (64, 4001), (2, 8))
REPLAYS = 100


class Rank:
    """A rank's GPU, its stream, and NCCL between all."""

    def __init__(self, communicator: Communicator, dtype: str):
        self.number, self.group = communicator.rank, tuple(range(communicator.world_size))
        self.device, self.dtype = Device(communicator.rank), dtype
        self.stream = Stream()
        self.way: NcclCommunicator = connect_nccl(load_nccl(), communicator, [self.group])

    def parts(self, shape: tuple[int, ...], seed: int) -> list[np.ndarray]:
        """What every rank puts in; all know it."""
        made = [np.random.default_rng((seed, each)).standard_normal(shape, np.float32) for each in self.group]
        return [each.astype(NUMPY_DTYPES[self.dtype]) for each in made]

    def buffer(self, array: np.ndarray) -> Buffer:
        buffer = Buffer(array.nbytes)
        self.stream.upload(buffer.pointer, array)
        self.stream.synchronize()
        return buffer

    def fetch(self, buffer: Buffer, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, NUMPY_DTYPES[self.dtype])
        self.stream.download(array, buffer.pointer)
        self.stream.synchronize()
        self.way.check()
        return array

    def compare(self, got: np.ndarray, given: list[np.ndarray], message: str) -> None:
        """With the sum in float32, rounded once, which is what every way makes of two numbers. Of more NCCL rounds more often."""
        wanted = add_in_rank_order([each.astype(np.float32) for each in given]).astype(got.dtype)
        if len(given) == 2:
            np.testing.assert_array_equal(got, wanted, err_msg=message)
            return
        error = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-22}[self.dtype] * len(given)
        largest = np.abs(np.stack(given).astype(np.float32)).max()
        np.testing.assert_allclose(
            got.astype(np.float32), wanted.astype(np.float32), rtol=error, atol=error * largest, err_msg=message
        )


def exchanges(rank: Rank) -> list[bytes]:
    """Sums, rows side by side, and letters round in a ring; the sums' bytes."""
    way, group, stream, sums = rank.way, rank.group, rank.stream.handle, []
    for seed, elements in enumerate(ELEMENTS):
        given = rank.parts((elements,), seed)
        x, y = rank.buffer(given[rank.number]), Buffer(given[0].nbytes)
        way.all_reduce(x.pointer, y.pointer, elements, rank.dtype, group, stream)
        sums.append(rank.fetch(y, (elements,)))
        rank.compare(sums[-1], given, f"{elements} elements")
        way.all_reduce(x.pointer, x.pointer, elements, rank.dtype, group, stream)
        np.testing.assert_array_equal(rank.fetch(x, (elements,)), sums[-1])
    for seed, (rows, columns) in enumerate(SHAPES):
        given = rank.parts((rows, columns), seed)
        x, y = rank.buffer(given[rank.number]), Buffer(given[0].nbytes * len(group))
        way.all_gather(x.pointer, y.pointer, rows, columns, rank.dtype, group, stream)
        np.testing.assert_array_equal(rank.fetch(y, (rows, columns * len(group))), np.concatenate(given, -1))
    last = group[-1]
    for seed, elements in enumerate(ELEMENTS):  # from stage to stage, as in a pipeline
        given = rank.parts((elements,), seed)
        x = rank.buffer(given[rank.number])
        if rank.number > 0:
            way.receive(x.pointer, given[0].nbytes, rank.number - 1, stream)
        if rank.number < last:
            way.send(x.pointer, given[0].nbytes, rank.number + 1, stream)
        np.testing.assert_array_equal(rank.fetch(x, (elements,)), given[0])
    return [each.tobytes() for each in sums]


def replays(rank: Rank) -> None:
    """A graph of sums and a gather, launched again and again on other numbers; it goes before its connection."""
    elements, (rows, columns), ranks = 4096, (2, 1600), len(rank.group)
    width = NUMPY_DTYPES[rank.dtype].itemsize
    buffers = [Buffer(size * width) for size in (elements, rows * columns, elements, rows * columns * ranks)]
    at, stream = [buffer.pointer for buffer in buffers], rank.stream

    def work() -> None:
        rank.way.all_reduce(at[0], at[2], elements, rank.dtype, rank.group, stream.handle)
        rank.way.all_gather(at[1], at[3], rows, columns, rank.dtype, rank.group, stream.handle)

    for pointer, buffer in zip(at, buffers, strict=True):
        stream.zero(pointer, buffer.nbytes)
    work()  # what it has to load and to allocate, it does now
    stream.synchronize()
    graph = stream.capture(work)
    for turn in range(REPLAYS):
        fresh = turn % 10 == 0
        if fresh:
            given = [
                rank.parts(shape, 1000 + turn + index) for index, shape in enumerate(((elements,), (rows, columns)))
            ]
            for pointer, each in zip(at, given, strict=False):
                stream.upload(pointer, each[rank.number])
        graph.launch(stream)
        if fresh:
            rank.compare(rank.fetch(buffers[2], (elements,)), given[0], f"turn {turn}")
            np.testing.assert_array_equal(rank.fetch(buffers[3], (rows, columns * ranks)), np.concatenate(given[1], -1))
    stream.synchronize()


def as_process(communicator: Communicator, dtype: str) -> list[bytes]:
    rank = Rank(communicator, dtype)
    sums = exchanges(rank)
    replays(rank)
    communicator.gather_objects(None)
    rank.way.leave()
    rank.way.close()
    return sums


def refusal(communicator: Communicator) -> str | None:
    """Both ranks on the first GPU."""
    device = Device(0)
    ends = gather_endpoints(communicator)
    assert device.info().sm
    return nccl_refusal(ends)


def gpus() -> int:
    return int(checked(driver().cuDeviceGetCount()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_gpu_for_each_rank(dtype: str) -> None:
    if gpus() < 2:
        pytest.skip("NCCL takes one rank of each GPU, and there is one GPU")
    ranks = min(gpus(), 4)
    said = results(run_spawned(ranks, as_process, dtype))
    assert all(sums == said[0] for sums in said), "all ranks get the same bits"


def test_two_ranks_on_one_gpu_are_refused() -> None:
    """Before NCCL is asked."""
    first, second = results(run_spawned(2, refusal))
    assert first == second
    assert first.startswith("NCCL takes one rank of each GPU, and ranks 0 and 1 share 0")


def test_the_environment_is_the_users() -> None:
    before = dict(os.environ)
    assert nccl_version(load_nccl())
    assert dict(os.environ) == before
