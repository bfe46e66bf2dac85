"""How a rank speaks with its peers, and the communicator of the current thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import numpy as np

from moecompiler.errors import UserError
from moecompiler.runtime.device_communicator import Ways

T = TypeVar("T")


class Communicator(Protocol):
    """What a rank needs of its peers. Arrays are C-contiguous float32 of the same shape on every rank of a group."""

    rank: int
    world_size: int
    device: Ways | None
    """How it exchanges what lies on a GPU; None until a backend that has such things sets it."""

    def all_reduce(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        """The sum over the group, added in rank order so that every rank holds the same bits."""

    def all_gather(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        """The group's arrays concatenated along the last axis, in rank order."""

    def send(self, array: np.ndarray, to: int) -> None:
        """Hands an array (any dtype and shape) to one rank, which must ``receive`` it. Does not wait for that; the array may be
        changed at once."""

    def receive(self, source: int) -> np.ndarray:
        """The next array from one rank."""

    def broadcast(self, value: Any, root: int) -> Any:
        """Root's ``value`` (any picklable object) on every rank."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (any picklable object), in rank order, on every rank."""


class Alone:
    """The communicator of a world of one rank."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.device: Ways | None = None

    def all_reduce(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        return array

    def all_gather(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        return array

    def send(self, array: np.ndarray, to: int) -> None:
        raise ValueError("a world of one rank has nobody to send to")

    def receive(self, source: int) -> np.ndarray:
        raise ValueError("a world of one rank has nobody to receive from")

    def broadcast(self, value: Any, root: int) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


def add_in_rank_order(parts: list[np.ndarray]) -> np.ndarray:
    """The one order of summation, so that every communicator gives every rank the same bits."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def on_one_rank(communicator: Communicator, root: int, function: Callable[[], T]) -> T:
    """Calls ``function`` on ``root`` alone; its result (picklable), or the UserError it raises, comes on every rank."""
    outcome: tuple[bool, Any] | None = None
    if communicator.rank == root:
        try:
            outcome = True, function()
        except UserError as error:
            outcome = False, error
    good, value = communicator.broadcast(outcome, root)
    if not good:
        raise value
    return value


# A custom op of an inference engine is called without a word about who calls; the thread is all there is to go by.
_CURRENT: ContextVar[Communicator] = ContextVar("communicator")


@contextmanager
def using_communicator(communicator: Communicator) -> Iterator[None]:
    """Collectives called from this thread inside the block go through ``communicator``."""
    token = _CURRENT.set(communicator)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_communicator() -> Communicator:
    """The communicator set for this thread. Raises LookupError where none is."""
    return _CURRENT.get()


def current_ways() -> Ways | None:
    """How the communicator set for this thread exchanges what lies on GPUs; None where there is none, or it has none."""
    communicator = _CURRENT.get(None)
    return None if communicator is None else communicator.device
