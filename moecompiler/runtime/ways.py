"""Which way ranks of a group exchange what lies on their GPUs: one pure choice, from where they are and what is there.

``ipc``: each reads and writes the others' memory. ``nccl``: NCCL. ``host``: through host memory and the rank's communicator,
MPI's or that of threads; it is always there, and it is how ranks without a GPU exchange everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from moecompiler.errors import UserError

NCCL_LEAST = 8 << 20
"""Bytes of a message from which on NCCL's rings are preferred to kernels that write to every peer."""


class Asked(StrEnum):
    """``--collectives``: ``auto`` chooses the best there is, anything else insists."""

    auto = "auto"
    host = "host"
    ipc = "ipc"
    nccl = "nccl"


@dataclass(frozen=True)
class Endpoint:
    """Where a rank's tensors are. ``gpu``: the PCI address, None on the CPU; ``reaches``: the GPUs of its host whose memory its
    own can read and write, itself among them; ``no_ipc``, ``no_nccl``: why it cannot be used here, None where it can."""

    rank: int
    host: str
    process: int
    gpu: str | None = None
    reaches: frozenset[str] = frozenset()
    no_ipc: str | None = None
    no_nccl: str | None = None


@dataclass(frozen=True)
class Way:
    """``name``: ``ipc``, ``nccl`` or ``host``; ``why``: in words, for users."""

    name: str
    why: str


def choose_way(asked: Asked, ends: Sequence[Endpoint], nbytes: int) -> Way:
    """The way for messages of ``nbytes`` among the ranks of a group, of which there are two or more; the same on all of them.

    Raises: UserError where one way is insisted on that is not there.
    """
    on_cpu = ends[0].gpu is None
    if on_cpu and asked in (Asked.ipc, Asked.nccl):
        raise UserError(f"--collectives {asked.value}: these engines run on the CPU; leave it out")
    if on_cpu or asked is Asked.host:
        medium = "threads of one process" if _one_process(ends) else "MPI"
        return Way("host", f"{medium}, on the CPU" if on_cpu else f"{medium}, --collectives host")
    refusals = {Asked.ipc: ipc_refusal(ends), Asked.nccl: nccl_refusal(ends)}
    if asked in refusals:
        if reason := refusals[asked]:
            raise UserError(
                f"--collectives {asked.value}: {reason}; give --collectives auto, which takes what there is"
            )
        return Way(asked.value, f"--collectives {asked.value}")
    if refusals[Asked.ipc] is None and (nbytes < NCCL_LEAST or refusals[Asked.nccl] is not None):
        large = f", and no NCCL: {refusals[Asked.nccl]}" if nbytes >= NCCL_LEAST else ""
        return Way("ipc", f"{_where(ends)}{large}")
    if refusals[Asked.nccl] is None:
        return Way("nccl", f"no CUDA IPC: {refusals[Asked.ipc]}" if refusals[Asked.ipc] else "a large message")
    return Way("host", f"no CUDA IPC: {refusals[Asked.ipc]}; no NCCL: {refusals[Asked.nccl]}")


def choose_link(asked: Asked, ends: Sequence[Endpoint]) -> Way:
    """The way of hidden states between the stages of a pipeline, whose ranks of one place are ``ends``: NCCL, or the host.

    Raises: UserError where NCCL is insisted on and is not there.
    """
    if ends[0].gpu is None or asked in (Asked.host, Asked.nccl):
        return choose_way(asked, ends, 0)
    reason = nccl_refusal(ends)
    return Way("host", f"no NCCL: {reason}") if reason else Way("nccl", "each stage has a GPU")


def ipc_refusal(ends: Sequence[Endpoint]) -> str | None:
    """Why these ranks cannot reach into each other's GPU; None where they can."""
    for end in ends:
        if end.no_ipc is not None:
            return end.no_ipc
        for other in ends:
            if other.host != end.host:
                return f"ranks {ends[0].rank} and {_elsewhere(ends).rank} are on two hosts"
            if other.gpu not in end.reaches:
                return f"the GPU of rank {end.rank} does not reach that of rank {other.rank}"
    return None


def nccl_refusal(ends: Sequence[Endpoint]) -> str | None:
    """Why NCCL cannot connect these ranks; None where it can."""
    used: dict[tuple[str, str | None], int] = {}
    for end in ends:
        if end.no_nccl is not None:
            return end.no_nccl
        first = used.setdefault((end.host, end.gpu), end.rank)
        if first != end.rank:
            return f"NCCL takes one rank of each GPU, and ranks {first} and {end.rank} share {end.gpu} of {end.host}"
    if len({(end.host, end.process) for end in ends}) < len(ends):
        return "ranks are threads of one process, whose CUDA graphs could wait for each other for ever"
    return None


def _where(ends: Sequence[Endpoint]) -> str:
    if len({end.gpu for end in ends}) == 1:
        return "ranks share one GPU"
    return "threads of one process" if _one_process(ends) else "one host, and GPUs that reach each other"


def _one_process(ends: Sequence[Endpoint]) -> bool:
    return len({(end.host, end.process) for end in ends}) == 1


def _elsewhere(ends: Sequence[Endpoint]) -> Endpoint:
    return next(end for end in ends if end.host != ends[0].host)
