"""What goes from GPU to GPU has the bits of numpy: 2 and 4 ranks, as processes and as threads, on one GPU or on several."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest

from moecompiler.runtime.communicator import Communicator, add_in_rank_order
from moecompiler.runtime.device import Buffer, checked, driver
from moecompiler.runtime.threads import run_in_threads
from moecompiler.tools.gpu_ranks import GpuRank, join
from moecompiler.tools.spawned_ranks import results, run_spawned
from moecompiler.weights import NUMPY_DTYPES

pytestmark = pytest.mark.gpu
DTYPES = ("float16", "bfloat16", "float32")
ELEMENTS = (1, 7, 4096, 8 * 4096 + 5, 131_073, 262_144, 700_001)
LARGE = 9_000_001  # more than a launch takes
SHAPES = ((1, 16_000), (3, 7), (64, 4001), (2, 8))
TURNS, REPLAYS = 200, 100


def parts(rank: GpuRank, shape: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """What every rank puts in; all know it."""
    ranks = len(rank.group)
    made = [np.random.default_rng((seed, each)).standard_normal(shape, np.float32) for each in range(ranks)]
    return [each.astype(NUMPY_DTYPES[rank.dtype]) for each in made]


def total(given: list[np.ndarray]) -> np.ndarray:
    return add_in_rank_order([each.astype(np.float32) for each in given]).astype(given[0].dtype)


def reduced(rank: GpuRank, given: list[np.ndarray], in_place: bool = False) -> np.ndarray:
    own = given[rank.communicator.rank]
    x = rank.buffer(own)
    y = x if in_place else Buffer(own.nbytes)
    rank.way.all_reduce(x.pointer, y.pointer, own.size, rank.dtype, rank.group, rank.stream.handle)
    return rank.fetch(y, own.shape)


def gathered(rank: GpuRank, given: list[np.ndarray]) -> np.ndarray:
    own = given[rank.communicator.rank]
    (rows, columns), ranks = own.shape, len(given)
    x, y = rank.buffer(own), Buffer(own.nbytes * ranks)
    rank.way.all_gather(x.pointer, y.pointer, rows, columns, rank.dtype, rank.group, rank.stream.handle)
    return rank.fetch(y, (rows, columns * ranks))


def normed(rank: GpuRank, rows: int, hidden: int, seed: int) -> None:
    """``x`` to the bit; ``y`` within a rounding, for its sum of squares has another order."""
    given = parts(rank, (rows, hidden), seed)
    residual, weight = parts(rank, (rows, hidden), seed + 1)[0], parts(rank, (hidden,), seed + 2)[0]
    assert rank.way.norm_fits(rows, hidden, rank.dtype, rank.group)
    inputs = [rank.buffer(each) for each in (residual, given[rank.communicator.rank], weight)]
    y, x = Buffer(residual.nbytes), Buffer(residual.nbytes)
    pointers = (inputs[0].pointer, inputs[1].pointer, inputs[2].pointer)
    rank.way.all_reduce_add_rms_norm(
        pointers, (y.pointer, x.pointer), rows, hidden, 1e-5, rank.dtype, rank.group, rank.stream.handle
    )
    wanted = residual + total(given)
    np.testing.assert_array_equal(rank.fetch(x, residual.shape), wanted)
    wide = wanted.astype(np.float32)
    norm = (wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(1e-5))).astype(wanted.dtype)
    error = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-5}[rank.dtype]
    got = rank.fetch(y, residual.shape).astype(np.float32)
    np.testing.assert_allclose(got, (weight * norm).astype(np.float32), rtol=error, atol=error / 100)


def turns(rank: GpuRank) -> None:
    """Sizes take turns, so that kernels and the places of messages do."""
    for turn in range(TURNS):
        given = parts(rank, (ELEMENTS[turn % len(ELEMENTS)],), turn)
        np.testing.assert_array_equal(
            reduced(rank, given, in_place=turn % 3 == 0), total(given), err_msg=f"turn {turn}"
        )
        if turn % 4 == 0:
            given = parts(rank, SHAPES[turn // 4 % len(SHAPES)], turn)
            np.testing.assert_array_equal(gathered(rank, given), np.concatenate(given, -1), err_msg=f"turn {turn}")
    given = parts(rank, (LARGE,), 0)
    np.testing.assert_array_equal(reduced(rank, given), total(given))
    given = parts(rank, (3, LARGE // 3), 1)
    np.testing.assert_array_equal(gathered(rank, given), np.concatenate(given, -1))
    for rows, hidden in ((1, 4096), (3, 6144), (16, 4096), (5, 264)):
        normed(rank, rows, hidden, rows)


def replays(rank: GpuRank) -> None:
    """A graph of small and large messages and of a gather, launched again and again on other numbers."""
    small, large, (rows, columns) = 4096, 700_001, (2, 1600)
    own, ranks, width = rank.communicator.rank, len(rank.group), NUMPY_DTYPES[rank.dtype].itemsize
    sizes = (small, large, rows * columns, small, large, rows * columns * ranks)
    buffers = [Buffer(size * width) for size in sizes]
    at, stream = [buffer.pointer for buffer in buffers], rank.stream.handle

    def work() -> None:
        rank.way.all_reduce(at[0], at[3], small, rank.dtype, rank.group, stream)
        rank.way.all_reduce(at[1], at[4], large, rank.dtype, rank.group, stream)
        rank.way.all_gather(at[2], at[5], rows, columns, rank.dtype, rank.group, stream)
        rank.way.all_reduce(at[3], at[3], small, rank.dtype, rank.group, stream)

    graph = rank.capture(work)
    for turn in range(REPLAYS):
        fresh = turn % 10 == 0
        if fresh:
            shapes = ((small,), (large,), (rows, columns))
            given = [parts(rank, shape, 1000 + turn + index) for index, shape in enumerate(shapes)]
            for pointer, each in zip(at, given, strict=False):
                rank.stream.upload(pointer, each[own])
        graph.launch(rank.stream)
        if fresh:
            np.testing.assert_array_equal(rank.fetch(buffers[3], (small,)), total([total(given[0])] * ranks))
            np.testing.assert_array_equal(rank.fetch(buffers[4], (large,)), total(given[1]))
            np.testing.assert_array_equal(rank.fetch(buffers[5], (rows, columns * ranks)), np.concatenate(given[2], -1))
    rank.stream.synchronize()
    rank.way.check()


def as_process(communicator: Communicator, dtype: str) -> str:
    rank = join(communicator, dtype)
    turns(rank)
    replays(rank)
    communicator.gather_objects(None)
    rank.way.leave()
    rank.way.close()
    return rank.how


def as_thread(communicator: Communicator, dtype: str) -> str:
    rank = join(communicator, dtype)
    turns(rank)
    rank.way.leave()
    rank.way.close()
    return rank.how


def without_a_peer(communicator: Communicator, how: str) -> Any:
    """Rank 1 is killed, or does nothing; the others' collectives end, and say so."""
    rank = join(communicator, "float16", patience_s=1.0)
    communicator.gather_objects(None)
    if communicator.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        communicator.gather_objects(None)
        return None
    said = []
    for elements in (4096, 700_001):
        try:
            reduced(rank, parts(rank, (elements,), 0))
        except RuntimeError as error:
            said.append(str(error))
    communicator.gather_objects(None)
    return said


def gpus() -> int:
    return int(checked(driver().cuDeviceGetCount()))


@pytest.mark.parametrize(("dtype", "ranks"), [*((dtype, 2) for dtype in DTYPES), ("float16", 4)])
def test_processes(dtype: str, ranks: int) -> None:
    """One GPU each where there are as many; where there are fewer, they share."""
    assert results(run_spawned(ranks, as_process, dtype)) == ["CUDA IPC between processes"] * ranks


def one_gpu(communicator: Communicator, dtype: str) -> str:
    """All on the first GPU of several."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return as_process(communicator, dtype)


def test_processes_that_share_one_of_several() -> None:
    if gpus() == 1:
        pytest.skip("there is one GPU, which test_processes has had")
    assert results(run_spawned(2, one_gpu, "float16")) == ["CUDA IPC between processes"] * 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_threads(ranks: int) -> None:
    assert (
        run_in_threads(ranks, lambda communicator: as_thread(communicator, "float16"))
        == ["threads of one process"] * ranks
    )


@pytest.mark.parametrize("how", ["killed", "idle"])
def test_a_peer_that_does_not_come(how: str) -> None:
    first, second = run_spawned(2, without_a_peer, how, timeout_s=60)
    assert first.error is None, first.error
    assert len(first.result) == 2, first.result
    if how == "idle":  # a dead peer's memory may be gone, which is an error of another name
        assert first.result == ["a collective between GPUs waited in vain for a peer (the group's member 2)"] * 2
    assert second.exitcode == (-signal.SIGKILL if how == "killed" else 0)
