"""Collectives, and what pipeline stages send each other, over NCCL: large messages, and ranks of several nodes.

NCCL adds in an order of its own and in the type of the tensors, so a sum over three ranks or more may differ from that of the
other ways by roundings of that type; all ranks of a group get the same bits. It refuses two ranks on one GPU, which is found out
before it is asked (``runtime.gpu_places``).

Our all-gather joins along the last axis, NCCL's along the first. More than one row goes through memory of our own, and from there
by one two-dimensional copy for each rank: copies need no kernel, which would have to be compiled for every GPU, and a CUDA graph
holds them. It is the logits that are gathered, once a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.device import Buffer, checked, driver
from moecompiler.runtime.device_communicator import BYTES
from moecompiler.runtime.nccl_library import DTYPES, SUM, UniqueId, call, explain

Group = tuple[int, ...]


class NcclCommunicator:
    """See ``device_communicator.DeviceCommunicator`` and ``device_link.DeviceLink``; made by ``connect_nccl``.

    ``handles``: this rank's ``ncclComm_t`` of each group. ``least``: bytes of the smallest message that it takes.
    """

    name, capturable = "nccl", True

    def __init__(self, library: Any, rank: int, handles: dict[Group, int], least: int = 0):
        self._library, self._rank, self._handles, self._least = library, rank, handles, least
        self._rooms: list[Buffer] = []  # a graph may hold the addresses of any of them

    def takes(self, nbytes: int, group: Group) -> bool:
        return group in self._handles and nbytes >= self._least

    def all_reduce(self, x: int, y: int, elements: int, dtype: str, group: Group, stream: int) -> None:
        call(self._library, "ncclAllReduce", x, y, elements, DTYPES[dtype], SUM, self._handles[group], stream)

    def all_gather(self, x: int, y: int, rows: int, columns: int, dtype: str, group: Group, stream: int) -> None:
        ranks, nbytes = len(group), columns * BYTES[dtype]
        gathered = y if rows == 1 else self._room(ranks * rows * nbytes)
        handle = self._handles[group]
        call(self._library, "ncclAllGather", x, gathered, rows * columns, DTYPES[dtype], handle, stream)
        if rows > 1:
            for number in range(ranks):
                part = gathered + number * rows * nbytes
                _copy_columns(part, y + number * nbytes, rows, nbytes, ranks * nbytes, stream)

    def send(self, pointer: int, nbytes: int, to: int, stream: int) -> None:
        handle, place = self._pair(to)
        call(self._library, "ncclSend", pointer, nbytes, DTYPES["bytes"], place, handle, stream)

    def receive(self, pointer: int, nbytes: int, source: int, stream: int) -> None:
        handle, place = self._pair(source)
        call(self._library, "ncclRecv", pointer, nbytes, DTYPES["bytes"], place, handle, stream)

    def check(self) -> None:
        """Raises: UserError where a connection has broken since."""
        for group, handle in self._handles.items():
            status = ctypes.c_int()
            call(self._library, "ncclCommGetAsyncError", handle, ctypes.byref(status))
            if status.value:
                raise UserError(explain(self._library, f"what ranks {group} exchange", status.value))

    def leave(self) -> None:
        """Nothing of the peers' is held."""

    def close(self) -> None:
        """By ``ncclCommAbort``, which waits for nobody: a peer may be gone. Graphs that hold calls have to be gone before."""
        while self._handles:
            self._library.ncclCommAbort(self._handles.popitem()[1])
        self._rooms.clear()

    def _pair(self, peer: int) -> tuple[int, int]:
        """The connection that leads to a rank, and its place there."""
        for group, handle in self._handles.items():
            if peer in group:
                return handle, group.index(peer)
        raise ValueError(f"rank {self._rank} has no connection to rank {peer}")

    def _room(self, nbytes: int) -> int:
        """Memory of at least so many bytes. It grows in the first, uncaptured run of a shape."""
        if not self._rooms or self._rooms[-1].nbytes < nbytes:
            self._rooms.append(Buffer(nbytes, "gathered tensors"))
        return self._rooms[-1].pointer


def connect_nccl(library: Any, communicator: Communicator, groups: Sequence[Group], least: int = 0) -> NcclCommunicator:
    """Connects this rank with those of its ``groups``. Called by all ranks together, each with as many groups; ranks that meet
    give the same one in the same place, and a group of one needs no connection. The GPU that a rank uses is current.

    The first rank of a group makes its unique id, which comes by ``communicator``.

    Raises: UserError, on all ranks, where a rank cannot be connected.
    """
    handles: dict[Group, int] = {}
    rank = communicator.rank
    for group in groups:
        said = communicator.gather_objects(_unique_id(library) if rank == group[0] and len(group) > 1 else None)
        _fail_together([each if isinstance(each, str) else None for each in said])
        failure = None
        if len(group) > 1:
            handle = ctypes.c_void_p()
            place, unique = group.index(rank), UniqueId.of(said[group[0]])
            try:
                call(library, "ncclCommInitRank", ctypes.byref(handle), len(group), unique, place)
                handles[group] = int(handle.value or 0)
            except UserError as error:
                failure = f"rank {rank}: {error}"
        failures = communicator.gather_objects(failure)
        if any(failures):
            NcclCommunicator(library, rank, handles).close()
        _fail_together(failures)
    return NcclCommunicator(library, rank, handles, least)


def _unique_id(library: Any) -> bytes | str:
    """What a group meets by, or why there is none."""
    unique = UniqueId()
    try:
        call(library, "ncclGetUniqueId", ctypes.byref(unique))
    except UserError as error:
        return str(error)
    return bytes(unique)


def _fail_together(failures: Sequence[str | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise UserError(failure)


def _copy_columns(source: int, target: int, rows: int, nbytes: int, pitch: int, stream: int) -> None:
    """Rows of ``nbytes`` that lie side by side go to where rows lie ``pitch`` bytes apart."""
    cuda = driver()
    copy = cuda.CUDA_MEMCPY2D()
    copy.srcMemoryType = copy.dstMemoryType = cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
    copy.srcDevice, copy.srcPitch = source, nbytes
    copy.dstDevice, copy.dstPitch = target, pitch
    copy.WidthInBytes, copy.Height = nbytes, rows
    checked(cuda.cuMemcpy2DAsync(copy, stream))
