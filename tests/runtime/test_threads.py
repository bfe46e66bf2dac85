from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from exchanges import collectives

from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator, current_communicator
from moecompiler.runtime.threads import Deadlock, RankStopped, run_in_threads

pytestmark = pytest.mark.timeout(20)


def test_every_collective() -> None:
    said = run_in_threads(3, collectives)
    arrays = [
        np.random.default_rng(rank).standard_normal((33, 5)).astype(np.float32) * np.float32(10.0**rank)
        for rank in range(3)
    ]
    for rank in range(3):
        np.testing.assert_array_equal(said[rank]["sum"], arrays[0] + arrays[1] + arrays[2])
        np.testing.assert_array_equal(said[rank]["columns"], np.concatenate(arrays, axis=1))
        np.testing.assert_array_equal(said[rank]["alone"], arrays[rank])
        assert said[rank]["broadcast"] == [0, 1, 2]
        assert said[rank]["objects"] == [("rank", 0), ("rank", 1), ("rank", 2)]
        assert said[rank]["error"] == "no such file"
    for rank in (0, 2):
        np.testing.assert_array_equal(said[rank]["pair"], arrays[0] + arrays[2])
        np.testing.assert_array_equal(said[rank]["pair again"], np.concatenate([arrays[0], arrays[2]], axis=1))
    assert [(array.dtype, array.shape) for array in said[2]["received"]] == [
        (np.float16, (1, 2)),
        (np.int64, (3, 2)),
        (np.int64, ()),
        (np.int32, (0, 4)),
    ]


def test_groups_act_at_the_same_time() -> None:
    """The pairs meet 1 : 200 times; they would deadlock if a group had to wait for the other."""

    def run(communicator: Communicator) -> float:
        group = (0, 1) if communicator.rank < 2 else (2, 3)
        total: np.ndarray = np.ones(1, np.float32)
        for _ in range(1 if communicator.rank < 2 else 200):
            total = communicator.all_reduce(total, group) / 2 + communicator.rank // 2
        return float(communicator.all_reduce(total, (0, 1, 2, 3))[0])

    assert run_in_threads(4, run) == [2 * (1 + 201)] * 4


def test_a_buffer_may_be_reused_after_a_collective() -> None:
    def run(communicator: Communicator) -> list[float]:
        buffer, sums = np.zeros(1000, np.float32), []
        for step in range(50):
            buffer[:] = step
            total = communicator.all_reduce(buffer, (0, 1))
            buffer[:] = -1
            assert (total == total[0]).all()
            sums.append(float(total[0]))
            total[:] = -1
        return sums

    assert run_in_threads(2, run) == [[2.0 * step for step in range(50)]] * 2


def test_broadcast_objects_are_not_shared() -> None:
    def run(communicator: Communicator) -> list[int]:
        value = communicator.broadcast([1, 2] if communicator.rank == 0 else None, 0)
        value.append(communicator.rank)
        communicator.gather_objects(None)
        return value

    assert run_in_threads(2, run) == [[1, 2, 0], [1, 2, 1]]


def test_each_thread_has_its_communicator() -> None:
    def run(communicator: Communicator) -> bool:
        return current_communicator() is communicator

    assert run_in_threads(3, run) == [True] * 3
    with pytest.raises(LookupError):
        current_communicator()


WAYS_TO_WAIT: dict[str, Callable[[Communicator], Any]] = {
    "all_reduce": lambda c: c.all_reduce(np.zeros(2, np.float32), (0, 1, 2)),
    "all_reduce in a group": lambda c: c.all_reduce(np.zeros(2, np.float32), (1, c.rank) if c.rank else (0, 1)),
    "receive": lambda c: c.receive(1),
    "broadcast": lambda c: c.broadcast(None, 1),
    "gather_objects": lambda c: c.gather_objects(None),
}


@pytest.mark.parametrize("way", WAYS_TO_WAIT)
def test_the_first_error_ends_all(way: str) -> None:
    ended: dict[int, BaseException] = {}

    def run(communicator: Communicator) -> None:
        try:
            if communicator.rank == 1:
                raise UserError("rank 1 has no such file")
            WAYS_TO_WAIT[way](communicator)
        except BaseException as error:
            ended[communicator.rank] = error
            raise

    with pytest.raises(UserError, match=r"^rank 1 has no such file") as caught:
        run_in_threads(3, run)
    assert "rank 1 of 3" in caught.value.__notes__[0]
    for rank in (0, 2):
        assert isinstance(ended[rank], RankStopped)
        assert ended[rank].__cause__ is ended[1]
        assert str(ended[rank]) == f"rank {rank} stopped: rank 1 has no such file"
    assert not any(thread.name.startswith("rank ") for thread in threading.enumerate())


@pytest.mark.parametrize("way", WAYS_TO_WAIT)
def test_waiting_for_a_rank_that_has_returned(way: str) -> None:
    with pytest.raises(Deadlock, match=r"every rank that still runs waits: rank 0 in .* for rank 1; rank 2 in"):
        run_in_threads(3, lambda c: None if c.rank == 1 else WAYS_TO_WAIT[way](c))


def test_waiting_in_a_circle() -> None:
    with pytest.raises(
        Deadlock, match=r"rank 0 in receive over \(1, 0\) for rank 1; rank 1 in receive over \(0, 1\) for rank 0"
    ):
        run_in_threads(2, lambda c: c.receive(1 - c.rank))


def test_different_collectives_do_not_match() -> None:
    zeros = np.zeros(1, np.float32)
    with pytest.raises(Deadlock, match=r"rank 0 in all_gather over .* for rank 1; rank 1 in all_reduce"):
        run_in_threads(2, lambda c: c.all_reduce(zeros, (0, 1)) if c.rank else c.all_gather(zeros, (0, 1)))


def test_arrays_of_different_shape() -> None:
    with pytest.raises(
        ValueError, match=r"all_reduce over ranks \(0, 1\): their arrays differ: float32\[1\], float32\[2\]"
    ):
        run_in_threads(2, lambda c: c.all_reduce(np.zeros(1 + c.rank, np.float32), (0, 1)))


def test_who_is_no_member_may_not_take_part() -> None:
    with pytest.raises(ValueError, match=r"rank 1 called all_reduce over \(0, 2\)"):
        run_in_threads(3, lambda c: c.all_reduce(np.zeros(1, np.float32), (0, 2)))
