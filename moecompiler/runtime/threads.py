"""All ranks as threads of one process, for debugging without MPI; the results have the same bits as under MPI.

Ranks post letters on channels and take them from there. Whoever waits is noted, so that a failed rank, or a program in
which every rank waits for another, ends all of them at once instead of hanging.
"""

from __future__ import annotations

import pickle
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from moecompiler.runtime.communicator import Communicator, add_in_rank_order, using_communicator
from moecompiler.runtime.device_communicator import Ways

T = TypeVar("T")


_PATIENCE_SECONDS = 5.0


class RankStopped(RuntimeError):
    """This rank was ended in a communication, because another rank failed; ``__cause__`` is that rank's error."""


class Deadlock(RuntimeError):
    """Every rank that still runs waits for another."""


class Channel(NamedTuple):
    """Where letters of one kind go from one rank to another, first in, first out."""

    kind: str
    group: tuple[int, ...]
    source: int
    to: int


class ThreadWorld:
    """What the ranks share. One condition guards all of it; it is notified of every letter and every end of a rank."""

    def __init__(self, size: int):
        self.size = size
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
        self._letters: defaultdict[Channel, deque[Any]] = defaultdict(deque)
        self._waiting: dict[int, list[Channel]] = {}
        self._running = size

    def post(self, channels: list[Channel], letter: Any) -> None:
        """Puts ``letter`` on each channel. Receivers share it: they must not write into it."""
        with self._changed:
            for channel in channels:
                self._letters[channel].append(letter)
            self._changed.notify_all()

    def take(self, rank: int, channels: list[Channel]) -> list[Any]:
        """Waits until there is a letter on every channel, and takes one from each.

        Raises: RankStopped where a rank failed, or where nobody is left that could post.
        """
        with self._changed:
            self._waiting[rank] = channels
            self._fail_if_stuck()
            self._changed.wait_for(lambda: self.failure is not None or self._filled(channels))
            del self._waiting[rank]
            if self.failure is not None:
                raise RankStopped(f"rank {rank} stopped: {self.failure}") from self.failure
            return [self._letters[channel].popleft() for channel in channels]

    def end(self, error: BaseException | None) -> None:
        """Says that a rank has ended; the first ``error`` stops the others in what they wait for."""
        with self._changed:
            self._running -= 1
            self.failure = self.failure or error
            self._fail_if_stuck()
            self._changed.notify_all()

    def stop(self, error: BaseException) -> None:
        """Stops every rank in its next communication."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def _filled(self, channels: list[Channel]) -> bool:
        return all(self._letters[channel] for channel in channels)

    def _fail_if_stuck(self) -> None:
        if self.failure or len(self._waiting) < self._running or any(map(self._filled, self._waiting.values())):
            return
        empty = [next(c for c in self._waiting[rank] if not self._letters[c]) for rank in sorted(self._waiting)]
        if empty:
            waits = "; ".join(f"rank {c.to} in {c.kind} over {c.group} for rank {c.source}" for c in empty)
            self.failure = Deadlock(f"every rank that still runs waits: {waits}")
            self._changed.notify_all()


class ThreadCommunicator:
    """One rank's ``Communicator`` in a ``ThreadWorld``; used by one thread."""

    def __init__(self, world: ThreadWorld, rank: int):
        self.rank = rank
        self.world_size = world.size
        self.device: Ways | None = None
        self._world = world

    def all_reduce(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        return array if len(group) == 1 else add_in_rank_order(self._arrays("all_reduce", array, group))

    def all_gather(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        return array if len(group) == 1 else np.concatenate(self._arrays("all_gather", array, group), axis=-1)

    def send(self, array: np.ndarray, to: int) -> None:
        self._world.post([Channel("receive", (self.rank, to), self.rank, to)], array.copy())

    def receive(self, source: int) -> np.ndarray:
        return self._world.take(self.rank, [Channel("receive", (source, self.rank), source, self.rank)])[0]

    def broadcast(self, value: Any, root: int) -> Any:
        everyone = tuple(range(self.world_size))
        if self.rank == root:
            others = [Channel("broadcast", everyone, root, rank) for rank in everyone if rank != root]
            self._world.post(others, pickle.dumps(value))
            return value
        return pickle.loads(self._world.take(self.rank, [Channel("broadcast", everyone, root, self.rank)])[0])

    def gather_objects(self, value: Any) -> list[Any]:
        everyone = tuple(range(self.world_size))
        return [pickle.loads(letter) for letter in self._exchange("gather_objects", pickle.dumps(value), everyone)]

    def _arrays(self, kind: str, array: np.ndarray, group: tuple[int, ...]) -> list[np.ndarray]:
        # a copy: an engine reuses the buffer as soon as this rank goes on, while another may still read it
        parts = self._exchange(kind, array.copy(), group)
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            shapes = ", ".join(f"{part.dtype}{list(part.shape)}" for part in parts)
            raise ValueError(f"{kind} over ranks {group}: their arrays differ: {shapes}")
        return parts

    def _exchange(self, kind: str, letter: Any, group: tuple[int, ...]) -> list[Any]:
        if self.rank not in group:
            raise ValueError(f"rank {self.rank} called {kind} over {group}, of which it is no member")
        self._world.post([Channel(kind, group, self.rank, peer) for peer in group], letter)
        return self._world.take(self.rank, [Channel(kind, group, peer, self.rank) for peer in group])


def run_in_threads(world_size: int, function: Callable[[Communicator], T]) -> list[T]:
    """Runs ``function`` once per rank, each in a thread with its communicator set as the current one.

    Returns the results in rank order. Raises the error of the rank that failed first, after all have ended; Deadlock where
    every rank waits for another.
    """
    world = ThreadWorld(world_size)
    results: dict[int, T] = {}

    def run(rank: int) -> None:
        communicator = ThreadCommunicator(world, rank)
        try:
            with using_communicator(communicator):
                results[rank] = function(communicator)
        except BaseException as error:
            error.add_note(f"raised by rank {rank} of {world_size}, which ran as a thread")
            world.end(error)
        else:
            world.end(None)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(world_size)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: the ranks end in their next communication
        world.stop(error)
        for thread in threads:
            if thread.is_alive():
                thread.join(
                    _PATIENCE_SECONDS
                )  # a thread inside an engine when the interpreter ends takes the process down
        raise
    if world.failure is not None:
        raise world.failure
    return [results[rank] for rank in range(world_size)]
