"""What ranks say to each other in the tests, and the program that says it under ``mpirun``: ``exchanges.py CASE FOLDER``."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from toy_session import ToySession

from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator, on_one_rank
from moecompiler.runtime.generation import Generation, GenerationOptions, generate
from moecompiler.runtime.mpi import abort, world
from moecompiler.runtime.nccl import connect_nccl
from moecompiler.runtime.nccl_library import UniqueId
from moecompiler.runtime.sampling import SamplingOptions

PROMPTS = [[5, 3, 8, 1], [7], [2, 2, 9, 11, 4, 6, 13]]


def collectives(communicator: Communicator) -> dict[str, Any]:
    """Every collective, on three ranks; sums whose bits depend on the order of addition."""
    rank = communicator.rank
    everyone, pair = (0, 1, 2), (0, 2)
    array = np.random.default_rng(rank).standard_normal((33, 5)).astype(np.float32) * np.float32(10.0**rank)
    said: dict[str, Any] = {
        "sum": communicator.all_reduce(array, everyone),
        "columns": communicator.all_gather(array, everyone),
        "alone": communicator.all_reduce(array, (rank,)),
    }
    if rank in pair:  # rank 1 goes on, and has a group of one meanwhile
        said["pair"] = communicator.all_reduce(array, pair)
        said["pair again"] = communicator.all_gather(array, pair)
    said["broadcast"] = communicator.broadcast({"tokens": np.arange(3)} if rank == 1 else None, 1)["tokens"].tolist()
    said["objects"] = communicator.gather_objects(("rank", rank))
    messages: list[np.ndarray] = [
        np.array([[1.5, -2.0]], np.float16),
        np.arange(6).reshape(2, 3).T,
        np.array(7, np.int64),
        np.zeros((0, 4), np.int32),
    ]
    for message in messages:
        if rank == 0:
            communicator.send(message, 2)
        if rank == 2:
            said.setdefault("received", []).append(communicator.receive(0))
    said["sum after"] = communicator.all_reduce(said["sum"], everyone)
    try:
        on_one_rank(communicator, 2, failing)
    except UserError as error:
        said["error"] = str(error)
    return said


def failing() -> None:
    raise UserError("no such file")


class Meetings:
    """The part of NCCL by which ranks meet; notes each meeting's size, the id that it goes by, and this rank's place there."""

    def __init__(self, rank: int):
        self.rank, self.made, self.met = rank, 0, list[tuple[int, str, int]]()

    def ncclGetUniqueId(self, unique: Any) -> int:
        self.made += 1
        unique._obj.internal = f"number {self.made} of rank {self.rank}".encode()
        return 0

    def ncclCommInitRank(self, handle: Any, size: int, unique: UniqueId, place: int) -> int:
        self.met.append((size, unique.internal.decode(), place))
        handle._obj.value = len(self.met)
        return 0


def meet_by_unique_id(communicator: Communicator) -> list[tuple[int, str, int]]:
    """Two groups of three ranks: those of a stage, and those of a place in every stage; rank 0 is in both."""
    groups = {0: [(0, 1), (0, 2)], 1: [(0, 1), (1,)], 2: [(2,), (0, 2)]}[communicator.rank]
    library = Meetings(communicator.rank)
    connect_nccl(library, communicator, groups)
    of_rank_0 = [(2, "number 1 of rank 0", 0), (2, "number 2 of rank 0", 0)]
    assert library.met == [of_rank_0, [(2, "number 1 of rank 0", 1)], [(2, "number 2 of rank 0", 1)]][communicator.rank]
    return library.met


def generation(mapping: Mapping, sampling: SamplingOptions | None = None) -> Callable[[Communicator], Generation]:
    options = GenerationOptions(9, sampling or SamplingOptions(), (17,), keep_logits=True)
    return lambda communicator: generate(ToySession(communicator, mapping), communicator, mapping, PROMPTS, options)


def fail_on_one_rank(communicator: Communicator) -> None:
    """Rank 1 fails, the others wait for it."""
    try:
        if communicator.rank == 1:
            raise ValueError("rank 1 had enough")
        communicator.all_reduce(np.zeros(3, np.float32), tuple(range(communicator.world_size)))
    except ValueError as error:
        print(f"rank {communicator.rank}: {error}", file=sys.stderr)
        abort(communicator, 3)


def die_on_one_rank(communicator: Communicator) -> None:
    """Rank 1 is killed, the others wait for it."""
    communicator.gather_objects(None)
    if communicator.rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    communicator.all_reduce(np.zeros(3, np.float32), tuple(range(communicator.world_size)))


CASES: dict[str, Callable[[Communicator], Any]] = {
    "collectives": collectives,
    "nccl": meet_by_unique_id,
    "tp2": generation(Mapping.create(tp_size=2)),
    "pp2": generation(Mapping.create(pp_size=2)),
    "fail": fail_on_one_rank,
    "die": die_on_one_rank,
}


if __name__ == "__main__":
    ranks = world(os.environ)
    result = CASES[sys.argv[1]](ranks)
    Path(sys.argv[2], f"{ranks.rank}.pickle").write_bytes(pickle.dumps(result))
