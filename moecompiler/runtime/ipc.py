"""Collectives between the GPUs of one node by kernels that write to one another's memory: CUDA IPC between processes, plain
pointers between threads of one. Ranks may share a GPU.

A peer that ends is noticed as ever: by the watchdog, which ends the process, and with it go its context and a kernel that waits
for the peer. Should nobody notice, and where ranks are threads, a kernel's own patience ends, and ``check`` says of whom.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from moecompiler.errors import UserError
from moecompiler.runtime import peer_memory
from moecompiler.runtime.collective_kernels import CollectiveKernels, Region
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.device import Buffer, DeviceError, HostBuffer, Stream
from moecompiler.runtime.peer_memory import Gpu

Group = tuple[int, ...]

PATIENCE_SECONDS = 60.0
"""For a peer to come to a collective: longer than any step of a rank that is well, its first one included."""


@dataclass(frozen=True)
class Offer:
    """What a rank tells the others: where it is, and its regions by group: their addresses, and handles for other processes
    (None: there is none). ``problem``: why it has no regions at all."""

    host: str
    process: int
    gpu: Gpu | None = None
    regions: Mapping[Group, tuple[int, bytes | None]] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Membership:
    """Of this rank in a group: its memory, the group's regions as this rank sees them, those of them that were opened, and
    whether a peer is a thread of this process."""

    buffer: Buffer
    region: Region
    pointers: tuple[int, ...]
    opened: list[int]
    threads: bool

    def let_go(self) -> None:
        """Of the peers' memory."""
        while self.opened:
            peer_memory.close_handle(self.opened.pop())


class IpcCommunicator:
    """See ``DeviceCommunicator``; made by ``connect``. Where ranks are threads of one process, they meet on the host before and
    after a launch: what one of them does then, loading a kernel say, may wait for the GPU, on which the launch waits for a peer
    that is not launched yet. So calls are not ``capturable`` there."""

    name = "ipc"

    def __init__(
        self,
        communicator: Communicator,
        kernels: CollectiveKernels,
        memberships: dict[Group, Membership],
        told: HostBuffer,
    ):
        self._communicator, self._kernels, self._memberships, self._told = communicator, kernels, memberships, told
        self.capturable = not any(each.threads for each in memberships.values())

    def takes(self, nbytes: int, group: Group) -> bool:
        return group in self._memberships

    def all_reduce(self, x: int, y: int, elements: int, dtype: str, group: Group, stream: int) -> None:
        region = self._checked(group, dtype, x, y)
        self._launch(group, lambda: self._kernels.all_reduce(x, y, elements, region, stream))

    def all_gather(self, x: int, y: int, rows: int, columns: int, dtype: str, group: Group, stream: int) -> None:
        region = self._checked(group, dtype, x, y)
        self._launch(group, lambda: self._kernels.all_gather(x, y, rows, columns, region, stream))

    def norm_fits(self, rows: int, hidden: int, dtype: str, group: Group) -> bool:
        """Whether ``all_reduce_add_rms_norm`` serves this; the same on all ranks of the group."""
        there = group in self._memberships and dtype == self._kernels.dtype
        return there and self._kernels.norm_fits(rows, hidden, self._memberships[group].region)

    def all_reduce_add_rms_norm(
        self,
        inputs: tuple[int, int, int],
        outputs: tuple[int, int],
        rows: int,
        hidden: int,
        epsilon: float,
        dtype: str,
        group: Group,
        stream: int,
    ) -> None:
        """As ``CollectiveKernels.all_reduce_add_rms_norm``; ``norm_fits`` has said that it can."""
        region = self._checked(group, dtype, *inputs, *outputs)
        self._launch(
            group,
            lambda: self._kernels.all_reduce_add_rms_norm(inputs, outputs, rows, hidden, epsilon, region, stream),
        )

    def check(self) -> None:
        place = int(self._told.array.view(np.uint32)[0])
        if place:
            raise RuntimeError(f"a collective between GPUs waited in vain for a peer (the group's member {place})")

    def leave(self) -> None:
        """See ``DeviceCommunicator``. Peers' memory must be let go before they free it."""
        for each in self._memberships.values():
            each.let_go()
        self._communicator.gather_objects(None)

    def close(self) -> None:
        for each in self._memberships.values():
            each.let_go()
        self._memberships.clear()

    def region(self, group: Group) -> Region:
        """This rank's, in a group that it serves."""
        return self._memberships[group].region

    def _checked(self, group: Group, dtype: str, *pointers: int) -> Region:
        if dtype != self._kernels.dtype:
            raise ValueError(f"the kernels of collectives are for {self._kernels.dtype}, not for {dtype}")
        if any(pointer % 16 for pointer in pointers):
            raise ValueError("a collective's tensors begin at multiples of 16 bytes")
        return self.region(group)

    def _launch(self, group: Group, launch: Callable[[], None]) -> None:
        if not self._memberships[group].threads:
            launch()
            return
        self._meet(group)
        launch()
        self._meet(group)

    def _meet(self, group: Group) -> None:
        self._communicator.all_gather(np.zeros(1, np.float32), group)


def connect(
    communicator: Communicator,
    groups: Collection[Group],
    kernels: CollectiveKernels | None,
    patience_s: float = PATIENCE_SECONDS,
) -> tuple[IpcCommunicator | None, str]:
    """Called by all ranks together, each with its GPU current. ``groups``: those in which this rank exchanges something;
    ``kernels``: None where it has none. The communicator serves those of the groups that it can; None where it can none; and in
    words how it does, or why it does not.
    """
    wanted = [group for group in groups if len(group) > 1]
    buffers: dict[Group, Buffer] = {}
    offers = communicator.gather_objects(_offer(wanted, kernels, buffers))
    joined, problems = dict[Group, Membership](), dict[Group, str]()
    for group in wanted:
        try:
            joined[group] = _join(communicator.rank, group, offers, buffers)
        except DeviceError as error:
            problems[group] = str(error)
    for refused in communicator.gather_objects(problems):
        for group in refused.keys() & joined.keys():
            joined.pop(group).let_go()
            problems[group] = refused[group]
    if kernels is None or not joined:
        return None, next(iter(problems.values()), "this rank exchanges nothing with others")
    told = HostBuffer(4)
    told.array[:] = 0
    stream = Stream()
    for group, each in joined.items():
        head = kernels.head(group.index(communicator.rank), each.pointers, int(patience_s * 1e9), told.pointer)
        stream.upload(each.region.pointer, np.frombuffer(head, np.uint8))
    stream.synchronize()
    how = "threads of one process" if any(each.threads for each in joined.values()) else "CUDA IPC between processes"
    return IpcCommunicator(communicator, kernels, joined, told), how


def _offer(wanted: list[Group], kernels: CollectiveKernels | None, buffers: dict[Group, Buffer]) -> Offer:
    """Fills ``buffers``, unless there is a problem."""
    offer = Offer(platform.node(), os.getpid())
    if kernels is None:
        return replace(offer, problem="the engine holds no kernels for collectives")
    if any(len(group) > kernels.most_ranks for group in wanted):
        return replace(offer, problem=f"a group has more than {kernels.most_ranks} ranks")
    try:
        gpu, stream = peer_memory.current_gpu(), Stream()
        regions = dict[Group, tuple[int, bytes | None]]()
        for group in wanted:
            buffer = buffers[group] = Buffer(kernels.region_bytes, "the memory of collectives")
            stream.zero(buffer.pointer, buffer.nbytes)
            regions[group] = buffer.pointer, _handle_of(buffer.pointer)
        stream.synchronize()  # before a peer writes
    except (DeviceError, UserError) as error:
        return replace(offer, problem=str(error))
    return replace(offer, gpu=gpu, regions=regions)


def _handle_of(pointer: int) -> bytes | None:
    with suppress(DeviceError):  # threads need none
        return peer_memory.handle_of(pointer)
    return None


def _join(rank: int, group: Group, offers: list[Offer], buffers: Mapping[Group, Buffer]) -> Membership:
    """Raises: DeviceError where a peer cannot be reached."""
    own = offers[rank]
    for peer in group:
        if offers[peer].problem is not None:
            raise DeviceError(f"rank {peer}: {offers[peer].problem}")
        if offers[peer].host != own.host:
            raise DeviceError(f"rank {rank} is on {own.host}, rank {peer} on {offers[peer].host}")
        if group not in offers[peer].regions:
            raise DeviceError(f"rank {peer} takes no part in {group}")
    gpus = [gpu for peer in group if (gpu := offers[peer].gpu) is not None]
    pointers, opened = list[int](), list[int]()
    try:
        for peer, gpu in zip(group, gpus, strict=True):
            pointer, handle = offers[peer].regions[group]
            if peer == rank:
                pointers.append(pointer)
            elif offers[peer].process == own.process:
                peer_memory.reach_within_process(gpu)
                pointers.append(pointer)
            else:
                if handle is None:
                    raise DeviceError(f"rank {peer}'s driver shares no memory between processes")
                peer_memory.check_reach(gpu)
                opened.append(peer_memory.open_handle(handle))
                pointers.append(opened[-1])
    except DeviceError:
        for pointer in opened:
            peer_memory.close_handle(pointer)
        raise
    sharing = Counter(gpu.uuid for gpu in gpus)
    programs = min(gpu.multiprocessors // sharing[gpu.uuid] for gpu in gpus)
    threads = sum(offers[peer].process == own.process for peer in group) > 1
    region = Region(pointers[group.index(rank)], len(group), max(1, programs))
    return Membership(buffers[group], region, tuple(pointers), opened, threads)
