"""``--launch``: the ``mpirun`` command that starts a verb on all its ranks, in the words of the MPI that is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NoReturn

from moecompiler.errors import UserError

_OWN_OPTIONS = {"--launch": 0, "--hosts": 1, "--mpirun": 1}  # not handed to the ranks; how many words follow
_VERSION_SECONDS = 20.0


class Launcher(Enum):
    """Whose ``mpirun`` it is: they want hosts, binding and root in different words."""

    open_mpi_4 = "Open MPI 4"
    open_mpi_5 = "Open MPI 5"
    mpich = "MPICH"


@dataclass(frozen=True)
class Host:
    """A host of ``--hosts``; ``slots``: how many ranks it takes, None: its share of them."""

    name: str
    slots: int | None


@dataclass(frozen=True)
class Here:
    """What the command depends on of this machine: whether the user is root, and how many cores there are."""

    root: bool
    cores: int


def launch(words: Sequence[str], ranks: int, hosts: str | None, mpirun: Path | None) -> NoReturn:
    """Becomes ``mpirun`` with ``words`` (a verb and its options) on ``ranks`` ranks.

    Raises: UserError where there is no ``mpirun`` of a kind that is known, or ``hosts`` is no list of hosts with room for all.
    """
    path = find_mpirun(mpirun)
    here = Here(os.geteuid() == 0, len(os.sched_getaffinity(0)))
    program = [sys.executable, "-m", "moecompiler.tools.main", *without_launch(words)]
    command = launch_command(launcher_of(path), str(path), ranks, parse_hosts(hosts), here, program)
    sys.stdout.flush()
    os.execv(path, command)


def launch_command(
    launcher: Launcher, mpirun: str, ranks: int, hosts: Sequence[Host], here: Here, program: Sequence[str]
) -> list[str]:
    """The words that start ``program`` on ``ranks`` ranks: host after host, none tied to cores; without ``hosts``, all here.

    Sources: the manual pages mpirun(1) of Open MPI 4.1 and 5.0, ``mpiexec -help`` of MPICH's hydra. Raises: UserError where the
    hosts have no room for them.
    """
    slots = share_out(ranks, hosts)
    listed = ",".join(f"{name}:{count}" for name, count in slots)
    words = [mpirun, "-n", str(ranks)]
    if launcher is Launcher.mpich:  # it minds neither root nor more ranks than cores, and ties none unless asked
        return [*words, *(["-hosts", listed] if listed else []), *program]
    words += ["--host", listed] if listed else []
    words += ["--allow-run-as-root"] if here.root else []
    crowded = not hosts and ranks > here.cores  # hosts have the slots they are said to have
    if launcher is Launcher.open_mpi_4:
        return [*words, "--bind-to", "none", *(["--oversubscribe"] if crowded else []), *program]
    words += ["--map-by", ":OVERSUBSCRIBE"] if crowded else []
    return [*words, "--bind-to", "none", "--stream-buffering", "0", *program]


def share_out(ranks: int, hosts: Sequence[Host]) -> list[tuple[str, int]]:
    """How many ranks each host takes: as many as its slots, or equal shares where no slots are given.

    Raises: UserError where they do not take all, or some have slots and some none.
    """
    if not hosts:
        return []
    if all(host.slots is None for host in hosts):
        if ranks % len(hosts):
            raise UserError(
                f"--hosts: {ranks} ranks cannot be dealt out evenly to {len(hosts)} hosts: give slots, as in a:4,b:2"
            )
        return [(host.name, ranks // len(hosts)) for host in hosts]
    counts = [(host.name, host.slots) for host in hosts if host.slots is not None]
    if len(counts) < len(hosts):
        raise UserError("--hosts: give all hosts their slots, as in a:4,b:4, or none of them")
    if (room := sum(count for _, count in counts)) < ranks:
        raise UserError(f"--hosts: {room} slots for {ranks} ranks: give more hosts or slots")
    return counts


def parse_hosts(text: str | None) -> list[Host]:
    """``a:4,b:4`` or ``a,b``. Raises: UserError where it is neither."""
    if text is None:
        return []
    hosts = []
    for word in text.split(","):
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?::([1-9][0-9]*))?", word.strip())
        if match is None:
            raise UserError(
                f"--hosts {text!r}: give host names joined by commas, with slots or without: a:4,b:4 or a,b"
            )
        hosts.append(Host(match[1], int(match[2]) if match[2] else None))
    return hosts


def find_mpirun(given: Path | None) -> Path:
    """``given``; else the one beside this Python; else the one on ``PATH``. Raises: UserError where there is none."""
    beside = Path(sys.executable).parent / "mpirun"
    name = str(given) if given is not None else str(beside) if beside.exists() else "mpirun"
    found = shutil.which(name)
    if found is None:
        what = f"--mpirun {given}: no such program" if given is not None else "there is no mpirun"
        raise UserError(f"{what}: install openmpi or MPICH, or run with --in_process")
    return Path(found).absolute()


def launcher_of(mpirun: Path) -> Launcher:
    """Asks ``mpirun --version``. Raises: UserError where that fails, or it is none that is known."""
    try:
        asked = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{mpirun} --version: {error}; give another with --mpirun") from None
    launcher = launcher_from(asked.stdout + asked.stderr)
    if launcher is None:
        first = next(iter((asked.stdout + asked.stderr).split("\n")), "")
        raise UserError(
            f"{mpirun}: says {first!r}, which is neither Open MPI 4 or 5 nor MPICH: give another with --mpirun, or call it"
            " yourself: mpirun -n RANKS moecompiler run … without --launch"
        )
    return launcher


def launcher_from(version: str) -> Launcher | None:
    """Whose ``mpirun --version`` says that; None: nobody's that is known."""
    if match := re.search(r"\(Open MPI\) (\d+)\.", version):
        major = int(match[1])
        return Launcher.open_mpi_5 if major >= 5 else Launcher.open_mpi_4 if major == 4 else None
    return Launcher.mpich if "HYDRA build details" in version else None


def without_launch(words: Sequence[str]) -> list[str]:
    """The words of a command line that the ranks get."""
    kept: list[str] = []
    skip = 0
    for word in words:
        if skip:
            skip -= 1
            continue
        name, equals, _ = word.partition("=")
        if name in _OWN_OPTIONS:
            skip = 0 if equals else _OWN_OPTIONS[name]
        else:
            kept.append(word)
    return kept
