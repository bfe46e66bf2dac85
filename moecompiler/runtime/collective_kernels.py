"""Kernels that exchange what lies on GPUs of one node, as ``ipc.py`` uses them; made in ``plugins``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Region:
    """A rank's memory for the exchanges of one group, which all ``ranks`` of it see; ``pointer`` is the rank's own view. A launch
    has at most ``programs`` programs, so that those of all ranks find room on the GPUs that they share."""

    pointer: int
    ranks: int
    programs: int


class CollectiveKernels(Protocol):
    """Pointers are the device's, and multiples of 16 bytes. Nothing is allocated or waited for: a CUDA graph can hold it all.

    ``dtype``: of the messages. ``region_bytes``: of a region, zero before its first use save for its head. ``most_ranks``: of a
    group.
    """

    dtype: str
    region_bytes: int
    most_ranks: int

    def head(self, rank: int, pointers: Sequence[int], patience_ns: int, told: int) -> bytes:
        """What a region begins with: ``rank`` is a place in the group, ``pointers`` are the group's regions as this rank sees
        them. A peer that has not come after ``patience_ns`` is given up: the host's uint32 at ``told`` becomes 1 + its place."""
        ...

    def all_reduce(self, x: int, y: int, elements: int, region: Region, stream: int) -> None:
        """See ``DeviceCommunicator.all_reduce``; summed in float32 in rank order and rounded once, as ``add_in_rank_order``."""
        ...

    def all_gather(self, x: int, y: int, rows: int, columns: int, region: Region, stream: int) -> None:
        """See ``DeviceCommunicator.all_gather``."""
        ...

    def norm_fits(self, rows: int, hidden: int, region: Region) -> bool:
        """Whether ``all_reduce_add_rms_norm`` takes rows of that many elements."""
        ...

    def all_reduce_add_rms_norm(
        self,
        inputs: tuple[int, int, int],
        outputs: tuple[int, int],
        rows: int,
        hidden: int,
        epsilon: float,
        region: Region,
        stream: int,
    ) -> None:
        """``inputs``: residual, branch ``[rows, hidden]``, weight ``[hidden]``; ``outputs``: y, x ``[rows, hidden]``. ``x`` is
        residual + Σ branch, ``y`` its norm, as ``AllReduceAddRMSNorm`` says."""
        ...
