"""Ranks as processes of ``mpirun``, over mpi4py; the sums have the same bits as those of ``threads.py``.

mpi4py is imported where it is needed only: importing ``mpi4py.MPI`` initializes MPI, which takes a second.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Alone, Communicator, add_in_rank_order
from moecompiler.runtime.device_communicator import Ways

# What a launcher sets in each process it starts: Open MPI; MPICH's and Intel's hydra, and `srun --mpi=pmi2`; MVAPICH.
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# PMIx (`prterun`, `srun --mpi=pmix`, `jsrun`) says the rank alone. SLURM's own variables prove nothing: they are also set in
# the script of a batch job, which is one process.
RANK_VARIABLE = "PMIX_RANK"
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", RANK_VARIABLE)

_HEADER, _BODY = 1, 2  # message tags


@dataclass(frozen=True)
class _Sent:
    """A message on its way, and the memory that MPI reads it from."""

    body: np.ndarray
    requests: tuple[Any, ...]

    def done(self) -> bool:
        return all(request.Test() for request in self.requests)


class MpiCommunicator:
    """This process's ``Communicator``; ``comm`` is an ``mpi4py.MPI.Comm``, by default all processes of the run."""

    def __init__(self, comm: Any = None):
        self._comm = comm if comm is not None else _mpi().COMM_WORLD
        self.rank: int = self._comm.Get_rank()
        self.world_size: int = self._comm.Get_size()
        self.device: Ways | None = None
        self._sent: list[_Sent] = []
        self._groups: dict[tuple[int, ...], Any] = {tuple(range(self.world_size)): self._comm}

    def all_reduce(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        # MPI_Allreduce may add in any order, and differently on every rank
        return array if len(group) == 1 else add_in_rank_order(self._arrays(array, group))

    def all_gather(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        return array if len(group) == 1 else np.concatenate(self._arrays(array, group), axis=-1)

    def send(self, array: np.ndarray, to: int) -> None:
        # a stage of a pipeline goes on to its next micro-batch; what is sent is kept until it is gone
        self._sent = [each for each in self._sent if not each.done()]
        body = np.array(array, order="C").reshape(-1).view(np.uint8)
        header = self._comm.isend((array.dtype, array.shape), dest=to, tag=_HEADER)
        self._sent.append(_Sent(body, (header, self._comm.Isend(body, dest=to, tag=_BODY))))

    def receive(self, source: int) -> np.ndarray:
        dtype, shape = self._comm.recv(source=source, tag=_HEADER)
        array = np.empty(shape, dtype)
        self._comm.Recv(array.reshape(-1).view(np.uint8), source=source, tag=_BODY)
        return array

    def broadcast(self, value: Any, root: int) -> Any:
        return self._comm.bcast(value, root=root)

    def gather_objects(self, value: Any) -> list[Any]:
        return self._comm.allgather(value)

    def second_channel(self) -> Any:
        """A communicator (``mpi4py.MPI.Comm``) of all ranks for another thread, or None where MPI takes calls from one thread
        alone; called by all ranks together."""
        mpi = _mpi()
        several = mpi.Query_thread() == mpi.THREAD_MULTIPLE
        return self._comm.Dup() if all(self._comm.allgather(several)) else None

    def abort(self, status: int) -> None:
        """Ends all processes of the run (``MPI_Abort``); ``mpirun`` exits with ``status``."""
        self._comm.Abort(status)

    def _arrays(self, array: np.ndarray, group: tuple[int, ...]) -> list[np.ndarray]:
        parts = np.empty((len(group), *array.shape), array.dtype)
        self._group(group).Allgather(np.ascontiguousarray(array), parts)
        return list(parts)

    def _group(self, group: tuple[int, ...]) -> Any:
        """The sub-communicator of these ranks, made when they first meet: only they take part in that."""
        if self.rank not in group:
            raise ValueError(f"rank {self.rank} called a collective over {group}, of which it is no member")
        if group not in self._groups:
            self._groups[group] = self._comm.Create_group(self._comm.Get_group().Incl(group))
        return self._groups[group]


def world(environment: Mapping[str, str]) -> MpiCommunicator | Alone:
    """The communicator of this process; ``environment`` is ``os.environ``, in which a launcher leaves its traces.

    Without such traces MPI is not initialized at all.

    Raises: UserError where MPI cannot be loaded, or where the launcher belongs to another MPI than the loaded one, so that
    every process takes itself for the only one.
    """
    sizes = [environment[name] for name in SIZE_VARIABLES if name in environment]
    if not sizes and RANK_VARIABLE not in environment:
        return Alone()
    communicator = MpiCommunicator()
    promised = int(sizes[0]) if sizes else 1 + int(environment[RANK_VARIABLE])  # at least so many
    if communicator.world_size < promised:
        raise UserError(
            f"the launcher started {'' if sizes else 'at least '}{promised} processes, but MPI sees"
            f" {communicator.world_size}: launcher and library differ ({_library()}); use the mpirun beside {sys.executable}"
        )
    return communicator


def launched_rank(environment: Mapping[str, str]) -> int | None:
    """The rank that a launcher gave this process, before MPI is initialized; None without a launcher."""
    return next((int(environment[name]) for name in RANK_VARIABLES if name in environment), None)


def abort(communicator: Communicator, status: int) -> NoReturn:
    """Ends every rank of the run at once, for an error that the other ranks cannot know of; exit status ``status``.

    A rank that merely exits would leave the others waiting for it, and would itself wait for them in ``MPI_Finalize``.
    """
    for stream in (sys.stdout, sys.stderr):  # MPI_Abort flushes nothing
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if isinstance(communicator, MpiCommunicator):
        communicator.abort(status)
    raise SystemExit(status)


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: the MPI library itself cannot be loaded
        reason = " ".join(str(error).split())
        raise UserError(f"MPI cannot be loaded ({reason}): install mpi4py and openmpi, or use --in_process") from None
    return MPI


def _library() -> str:
    return _mpi().Get_library_version().split(",")[0]
