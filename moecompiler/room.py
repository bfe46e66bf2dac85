"""How many tasks fit this machine at once: its cores, and its memory against an estimate of what a task takes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
PROCESS = GIB  # of a process that exports or optimizes, or that builds from weights it does not keep: measured 0.9 GiB


@dataclass(frozen=True)
class Room:
    """``cores`` that this process may use; ``memory``: bytes that are free, None where the system does not say."""

    cores: int
    memory: int | None

    @staticmethod
    def here() -> Room:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Room(cores, free_memory(_read))


def free_memory(read: Callable[[str], str | None]) -> int | None:
    """Bytes that processes can be given: what Linux says is available, and what the control group may still take (version 2).
    ``read`` gives a file's text; None where there is none."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", read("/proc/meminfo") or "", re.MULTILINE)
    limits = [int(found[1]) << 10] if found else []
    group = re.search(r"^0::(.*)$", read("/proc/self/cgroup") or "", re.MULTILINE)
    folder = f"/sys/fs/cgroup{group[1].rstrip('/')}" if group else "/sys/fs/cgroup"
    most, used = ((read(f"{folder}/memory.{name}") or "").strip() for name in ("max", "current"))
    if most.isdigit() and used.isdigit():
        limits.append(max(0, int(most) - int(used)))
    return min(limits) if limits else None


def workers_that_fit(asked: int, tasks: int, each: int, room: Room) -> tuple[int, str | None]:
    """How many of ``asked`` processes to work with, at least one, where each takes about ``each`` bytes; and what to say of it:
    nothing where one is asked for."""
    if asked <= 1 or tasks <= 1:
        return asked, None
    fit = asked if room.memory is None else max(1, room.memory // each)
    workers = min(asked, max(1, room.cores), fit)
    free = "" if room.memory is None else f", {room.memory / GIB:.1f} GiB free"
    said = f"about {each / GIB:.1f} GiB of memory each, {min(workers, tasks)} at once"
    fewer = f" instead of {min(asked, tasks)}" if workers < min(asked, tasks) else ""
    return workers, f"{said}{fewer} ({room.cores} cores{free})"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None
