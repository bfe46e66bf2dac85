"""Connects ranks whose tensors are on GPUs: finds out where they are, chooses ways, opens them, and says which and why."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime import ipc
from moecompiler.runtime.collective_kernels import CollectiveKernels
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.device_communicator import DeviceCommunicator, Ways
from moecompiler.runtime.endpoints import gather_endpoints
from moecompiler.runtime.host_way import HostWay
from moecompiler.runtime.nccl import NcclCommunicator, connect_nccl
from moecompiler.runtime.nccl_library import load_nccl
from moecompiler.runtime.ways import NCCL_LEAST, Asked, Endpoint, Way, choose_link, choose_way

Group = tuple[int, ...]


@dataclass(frozen=True)
class Choices:
    """Ways of every group of ranks that reduce together, for small and for large messages, and of every column of ranks that send
    to one another from stage to stage. Groups of one are left out."""

    small: dict[Group, Way]
    large: dict[Group, Way]
    links: dict[Group, Way]

    @property
    def names(self) -> set[str]:
        return {way.name for each in (self.small, self.large, self.links) for way in each.values()}


def choose(asked: Asked, mapping: Mapping, ends: Sequence[Endpoint]) -> Choices:
    """The same on every rank, from ``ends`` in rank order. Raises: UserError where what is insisted on is not there."""
    groups = {mapping.tp_group(rank) for rank in range(mapping.world_size)}
    columns = {column(mapping, rank) for rank in range(mapping.world_size)}
    small, large = (
        {group: choose_way(asked, [ends[rank] for rank in group], nbytes) for group in sorted(groups) if len(group) > 1}
        for nbytes in (0, NCCL_LEAST)
    )
    links = {each: choose_link(asked, [ends[rank] for rank in each]) for each in sorted(columns) if len(each) > 1}
    return Choices(small, large, links)


def column(mapping: Mapping, rank: int) -> Group:
    """The ranks of this one's place in every stage."""
    return tuple(range(mapping.tp_rank(rank), mapping.world_size, mapping.tp_size))


def connect_ranks(
    asked: Asked, communicator: Communicator, mapping: Mapping, kernels: CollectiveKernels | None
) -> tuple[Ways, list[str]]:
    """Called by all ranks together, when each has loaded its engine and its GPU is current; ``kernels``: those that the engine
    holds for CUDA IPC. The rank's ways, and in words what goes which way and why.

    What turns out not to work is done without, unless it is insisted on.

    Raises: UserError, on every rank, where what is insisted on is not there.
    """
    rank = communicator.rank
    ends = gather_endpoints(communicator, None if kernels else "the engine holds no kernels for collectives")
    choices, own = choose(asked, mapping, ends), mapping.tp_group(rank)
    ways: list[DeviceCommunicator] = []
    if "ipc" in choices.names:
        opened, why = ipc.connect(communicator, [own] if _uses(choices, own, "ipc") else [], kernels)
        served = len(own) == 1 or not _uses(choices, own, "ipc") or (opened is not None and opened.takes(0, own))
        failures = communicator.gather_objects(None if served else why)
        ends = [replace(end, no_ipc=failures[end.rank] or end.no_ipc) for end in ends]
        choices = choose(asked, mapping, ends)
        ways += [opened] if opened is not None else []
    nccl = None
    if "nccl" in choices.names:
        try:
            nccl = _connect_nccl(communicator, choices, own, column(mapping, rank))
        except UserError as error:
            if asked is Asked.nccl:
                raise
            choices = choose(asked, mapping, [replace(end, no_nccl=str(error)) for end in ends])
    if nccl is not None:
        ways.insert(0, nccl)
    link = nccl if nccl is not None and _name(choices.links, column(mapping, rank)) == "nccl" else None
    return Ways([*ways, HostWay(communicator)], link), _words(choices)


@contextmanager
def connected(asked: Asked, communicator: Communicator, mapping: Mapping, session: Any) -> Iterator[list[str]]:
    """Connects the ranks of sessions, where their tensors are on GPUs (``collective_kernels`` tells); gives in words which way
    what goes. Closes the session at the end: NCCL waits for graphs that hold its calls. See ``connect_ranks``."""
    if communicator.world_size == 1:
        yield []
        return
    on_gpu = communicator.gather_objects(hasattr(session, "collective_kernels"))
    if not all(on_gpu):
        ends = [Endpoint(number, host, process) for number, (host, process) in enumerate(_processes(communicator))]
        yield _words(choose(asked, mapping, ends))
        return
    ways, words = connect_ranks(asked, communicator, mapping, session.collective_kernels)
    communicator.device = ways
    try:
        yield words
        ways.leave()
    finally:
        communicator.device = None
        session.close()
        ways.close()


def _connect_nccl(communicator: Communicator, choices: Choices, group: Group, line: Group) -> NcclCommunicator:
    alone = (communicator.rank,)
    small, large = _name(choices.small, group), _name(choices.large, group)
    groups = [
        group if "nccl" in (small, large) else alone,
        line if _name(choices.links, line) == "nccl" else alone,
    ]
    return connect_nccl(load_nccl(), communicator, groups, 0 if small == "nccl" else NCCL_LEAST)


def _uses(choices: Choices, group: Group, name: str) -> bool:
    return name in (_name(choices.small, group), _name(choices.large, group))


def _name(ways: dict[Group, Way], group: Group) -> str | None:
    return ways[group].name if group in ways else None


def _processes(communicator: Communicator) -> list[tuple[str, int]]:
    return list(communicator.gather_objects((platform.node(), os.getpid())))


def _words(choices: Choices) -> list[str]:
    """Groups of which the same is to be said share a line."""
    lines: dict[str, list[Group]] = {}
    for group, small in choices.small.items():
        large = choices.large[group]
        text = f"{small.name} ({small.why})"
        if large.name != small.name:
            text += f", from {NCCL_LEAST >> 20} MiB on {large.name} ({large.why})"
        lines.setdefault(f"collectives: {text}", []).append(group)
    for line, way in choices.links.items():
        lines.setdefault(f"from stage to stage: {way.name} ({way.why})", []).append(line)
    return [f"{text}; ranks {' '.join(','.join(map(str, each)) for each in groups)}" for text, groups in lines.items()]
