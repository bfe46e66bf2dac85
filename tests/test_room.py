"""How many tasks a machine has room for."""

from __future__ import annotations

import pytest

from moecompiler.room import GIB, Room, free_memory, workers_that_fit

MEMINFO = "MemTotal:       24000000 kB\nMemFree:        100 kB\nMemAvailable:   2097152 kB\n"
GROUP = "/sys/fs/cgroup/box"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"/proc/meminfo": MEMINFO}, 2 * GIB),
        ({"/proc/meminfo": MEMINFO, "/sys/fs/cgroup/memory.max": "max\n"}, 2 * GIB),
        (
            {
                "/proc/meminfo": MEMINFO,
                "/proc/self/cgroup": "0::/box\n",
                f"{GROUP}/memory.max": "3000\n",
                f"{GROUP}/memory.current": "1000\n",
            },
            2000,
        ),
        ({"/sys/fs/cgroup/memory.max": "3000", "/sys/fs/cgroup/memory.current": "4000"}, 0),
    ],
)
def test_free_memory(files: dict[str, str], free: int | None) -> None:
    assert free_memory(files.get) == free


@pytest.mark.parametrize(
    ("asked", "tasks", "room", "workers", "said"),
    [
        (1, 8, Room(2, 8 * GIB), 1, None),
        (8, 1, Room(2, 8 * GIB), 8, None),
        (2, 8, Room(4, 8 * GIB), 2, "about 2.0 GiB of memory each, 2 at once (4 cores, 8.0 GiB free)"),
        (8, 8, Room(4, 64 * GIB), 4, "about 2.0 GiB of memory each, 4 at once instead of 8 (4 cores, 64.0 GiB free)"),
        (8, 8, Room(16, 7 * GIB), 3, "about 2.0 GiB of memory each, 3 at once instead of 8 (16 cores, 7.0 GiB free)"),
        (8, 8, Room(16, GIB), 1, "about 2.0 GiB of memory each, 1 at once instead of 8 (16 cores, 1.0 GiB free)"),
        (4, 2, Room(8, None), 4, "about 2.0 GiB of memory each, 2 at once (8 cores)"),
    ],
)
def test_workers_that_fit(asked: int, tasks: int, room: Room, workers: int, said: str | None) -> None:
    assert workers_that_fit(asked, tasks, 2 * GIB, room) == (workers, said)


def test_this_machine_has_room() -> None:
    room = Room.here()
    assert room.cores >= 1
    assert room.memory is None or room.memory > 0
