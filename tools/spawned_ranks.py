"""Ranks as processes that this one starts, without MPI: for benchmarks and tests of what goes from GPU to GPU.

What ranks tell each other goes through this process, by pipes; it is small.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

import numpy as np

from moecompiler.runtime.communicator import add_in_rank_order, using_communicator
from moecompiler.runtime.device_communicator import Ways

_TELL, _RESULT, _ERROR = "tell", "result", "error"


@dataclass(frozen=True)
class Ended:
    """How a rank ended: with a ``result``, an ``error`` (a stack trace), or without a word (``exitcode``, negative: a signal)."""

    result: Any
    error: str | None
    exitcode: int | None


class PipeCommunicator:
    """A rank's ``Communicator``: whole groups are all ranks, which is all that is needed of it here."""

    def __init__(self, rank: int, world_size: int, pipe: Connection):
        self.rank, self.world_size, self._pipe = rank, world_size, pipe
        self.device: Ways | None = None

    def all_reduce(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        return add_in_rank_order([part.copy() for part in self._parts(array, group)])

    def all_gather(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        return np.concatenate(self._parts(array, group), axis=-1)

    def send(self, array: np.ndarray, to: int) -> None:
        raise NotImplementedError("ranks that are started so exchange with all others at once")

    def receive(self, source: int) -> np.ndarray:
        raise NotImplementedError("ranks that are started so exchange with all others at once")

    def broadcast(self, value: Any, root: int) -> Any:
        return self.gather_objects(value)[root]

    def gather_objects(self, value: Any) -> list[Any]:
        self._pipe.send((_TELL, value))
        return list(self._pipe.recv())

    def _parts(self, array: np.ndarray, group: tuple[int, ...]) -> list[np.ndarray]:
        if group != tuple(range(self.world_size)):
            raise ValueError(f"{group} is not all ranks")
        return self.gather_objects(array)


def run_spawned(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0
) -> list[Ended]:
    """Calls ``function(communicator, *arguments)`` (picklable) in a fresh process per rank; how each ended, in rank order.

    What a rank tells waits for all that still run. Raises: TimeoutError where that is too long; no process is left behind.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = list[Connection](), list[Any]()
    for rank in range(world_size):
        here, there = context.Pipe()
        processes.append(context.Process(target=_run, args=(rank, world_size, there, function, arguments), daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        outcomes = _serve(pipes, monotonic() + timeout_s)
        for process in processes:
            process.join(10)
        return [Ended(*outcomes.get(rank, (None, None)), processes[rank].exitcode) for rank in range(world_size)]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def results(ended: list[Ended]) -> list[Any]:
    """Raises: RuntimeError where a rank did not end well."""
    for rank, each in enumerate(ended):
        if each.error is not None or each.exitcode:
            raise RuntimeError(f"rank {rank} ended with status {each.exitcode}\n{each.error or ''}")
    return [each.result for each in ended]


def _serve(pipes: list[Connection], deadline: float) -> dict[int, tuple[Any, str | None]]:
    """Hands round what ranks tell, until all have ended: results and errors by rank; nothing of one that went without a word."""
    running, told, outcomes = dict(enumerate(pipes)), dict[int, Any](), dict[int, tuple[Any, str | None]]()
    while running:
        if monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(running)} have not ended, and {sorted(told)} wait for the others")
        ready = wait([running[rank] for rank in running if rank not in told], timeout=1.0)
        for rank, pipe in [(rank, pipe) for rank, pipe in running.items() if pipe in ready]:
            try:
                kind, value = pipe.recv()
            except EOFError:
                running.pop(rank)
                continue
            if kind == _TELL:
                told[rank] = value
            else:
                outcomes[rank] = (value, None) if kind == _RESULT else (None, str(value))
        if told.keys() >= running.keys() and told:
            everything = [told.get(rank) for rank in range(len(pipes))]
            told.clear()
            for pipe in running.values():
                pipe.send(everything)
    return outcomes


def _run(
    rank: int, world_size: int, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    communicator = PipeCommunicator(rank, world_size, pipe)
    try:
        with using_communicator(communicator):
            result = function(communicator, *arguments)
        pipe.send((_RESULT, result))
    except BaseException:
        pipe.send((_ERROR, traceback.format_exc()))
        raise
