"""Which ranks still live, by what was last heard of them; no clock and no network of its own."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

IDLE_SHARE = (
    0.01  # of the time: who works less is taken for stuck; a rank that waits for another in MPI works, it polls
)
_BYTES_PER_S = 1e6  # what reading at least counts as work: a slow disk's megabyte


@dataclass(frozen=True)
class LostRank:
    """``how`` completes "rank 3 on node7 …"."""

    rank: int
    how: str


@dataclass
class VitalSigns:
    """What was heard of ``ranks``. A rank is lost after ``seconds`` of silence, or of signs in which it did nothing."""

    ranks: tuple[int, ...]
    seconds: float
    now: float
    _heard: dict[int, float] = field(init=False)
    _busy: dict[int, tuple[float, float]] = field(
        init=False, default_factory=dict
    )  # until when, with how much work done

    def __post_init__(self) -> None:
        self.forgive(self.now)

    def forgive(self, now: float) -> None:
        """Starts anew: who judges was itself stopped for a while, as a whole job is by Ctrl-Z."""
        self._heard = dict.fromkeys(self.ranks, now)
        self._busy.clear()

    def hear(self, rank: int, work_s: float, now: float) -> None:
        """A sign of life; ``work_s``: what the rank has done since it began, see ``work_done``."""
        self._heard[rank] = now
        since, before = self._busy.setdefault(rank, (now, work_s))
        if work_s - before >= IDLE_SHARE * (now - since):
            self._busy[rank] = now, work_s

    def lost(self, now: float, seconds: float | None = None) -> LostRank | None:
        """The first rank that is lost, if any; ``seconds`` in place of those of all."""
        patience = self.seconds if seconds is None else seconds
        for rank in self.ranks:
            if now - self._heard[rank] > patience:
                return LostRank(rank, f"has given no sign of life for {now - self._heard[rank]:.1f} s")
            if rank in self._busy and now - self._busy[rank][0] > patience:
                return LostRank(rank, f"hangs: it has done nothing for {now - self._busy[rank][0]:.1f} s")
        return None


def work_done() -> float:
    """What this process has done so far, in seconds: of the CPU, and for what it has read of files."""
    return time.process_time() + _bytes_read() / _BYTES_PER_S


def _bytes_read() -> int:
    try:
        lines = Path(f"/proc/{os.getpid()}/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])
    except (OSError, KeyError, ValueError):
        return 0
