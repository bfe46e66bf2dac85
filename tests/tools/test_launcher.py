"""``--launch``: the words each kind of ``mpirun`` gets, by fakes that write them down; the one that is there runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import PROMPT, Here, Output, started, wait_for

from moecompiler.errors import UserError
from moecompiler.tools import launcher as launching
from moecompiler.tools.launcher import (
    Host,
    Launcher,
    launch_command,
    launcher_from,
    parse_hosts,
    share_out,
    without_launch,
)

Engines = Callable[[str], Path]
pytestmark = pytest.mark.xdist_group("errors")

# the first lines of `mpirun --version`, as each of them prints it
VERSIONS = {
    "mpirun (Open MPI) 4.1.6\n\nReport bugs to http://www.open-mpi.org/community/help/\n": Launcher.open_mpi_4,
    "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n": Launcher.open_mpi_5,
    "HYDRA build details:\n    Version:                                 5.0.2\n": Launcher.mpich,
    "mpirun (Open MPI) 3.1.3\n": None,
    "Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005\n": None,
}
WORDS = {
    Launcher.open_mpi_4: "--host a:4,b:4 --allow-run-as-root --bind-to none",
    Launcher.open_mpi_5: "--host a:4,b:4 --allow-run-as-root --bind-to none --stream-buffering 0",
    Launcher.mpich: "-hosts a:4,b:4",
}
CROWDED = {
    Launcher.open_mpi_4: "--bind-to none --oversubscribe",
    Launcher.open_mpi_5: "--map-by :OVERSUBSCRIBE --bind-to none --stream-buffering 0",
    Launcher.mpich: "",
}


@pytest.mark.parametrize(("version", "launcher"), VERSIONS.items())
def test_whose_it_is(version: str, launcher: Launcher | None) -> None:
    assert launcher_from(version) is launcher


@pytest.mark.parametrize("launcher", Launcher)
def test_words(launcher: Launcher) -> None:
    def words(ranks: int, hosts: list[Host], root: bool, cores: int) -> str:
        here = launching.Here(root, cores)
        return " ".join(launch_command(launcher, "/bin/mpirun", ranks, hosts, here, ["python", "run"]))

    hosts = [Host("a", None), Host("b", None)]
    assert words(8, hosts, True, 2) == f"/bin/mpirun -n 8 {WORDS[launcher]} python run"
    assert words(8, [], False, 2).split() == f"/bin/mpirun -n 8 {CROWDED[launcher]} python run".split()
    assert "versubscribe" not in words(2, [], False, 2).lower()
    assert "root" not in words(2, [], False, 2)


def test_hosts() -> None:
    assert parse_hosts(None) == []
    assert parse_hosts("node-1.x:8,b:2") == [Host("node-1.x", 8), Host("b", 2)]
    assert share_out(6, parse_hosts("a:8,b:2")) == [("a", 8), ("b", 2)]
    assert share_out(6, parse_hosts("a,b,c")) == [("a", 2), ("b", 2), ("c", 2)]
    for ranks, text, said in (
        (5, "a,b", "cannot be dealt out evenly to 2 hosts"),
        (5, "a:2,b:2", "4 slots for 5 ranks"),
        (5, "a:2,b", "give all hosts their slots"),
        (2, "a:0", "give host names joined by commas"),
        (2, "--x,b", "give host names joined by commas"),
    ):
        with pytest.raises(UserError, match=said):
            share_out(ranks, parse_hosts(text))


def test_what_the_ranks_get() -> None:
    words = ["run", "--launch", "--hosts", "a,b", "--seed=3", "--mpirun=/x", "--input_text", "y"]
    assert without_launch(words) == ["run", "--seed=3", "--input_text", "y"]


def fake_mpirun(folder: Path, version: str) -> Path:
    """Says that version; else prints its words, one a line."""
    path = folder / "mpirun"
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then cat <<"EOF"\n{version}EOF\nelse printf "%s\\n" "$@"; fi\n'
    )
    path.chmod(0o755)
    return path


def launched(folder: Path, *arguments: object) -> Output:
    with started(["moecompiler", "run", "--launch", *map(str, arguments)], folder) as process:
        status = wait_for(process)
    return Output(status, (folder / "out").read_text(), (folder / "err").read_text())


def test_it_becomes_mpirun(engines: Engines, tmp_path: Path) -> None:
    mpirun = fake_mpirun(tmp_path, next(each for each, launcher in VERSIONS.items() if launcher is Launcher.mpich))
    said = launched(
        tmp_path, "--mpirun", mpirun, "--hosts", "a,b", "--engine_dir", engines("ep2"), "--max_output_len", 4
    )
    assert said.status == 0, said.err
    program = [sys.executable, "-m", "moecompiler.tools.main", "run", "--engine_dir", str(engines("ep2"))]
    assert said.out.splitlines() == ["-n", "2", "-hosts", "a:1,b:1", *program, "--max_output_len", "4"]


@pytest.mark.mpi
def test_the_one_that_is_there(engines: Engines, here: Here, tmp_path: Path) -> None:
    words = ("--engine_dir", engines("ep2"), "--max_output_len", 4, "--input_text", PROMPT)
    said = launched(tmp_path, *words)
    assert said.status == 0, said.err
    assert said.out == here("run", *words, "--in_process").out


def test_refused(engines: Engines, here: Here, tmp_path: Path) -> None:
    words = ("run", "--engine_dir", engines("ep2"), "--max_output_len", 4, "--input_text", "x")
    unknown = fake_mpirun(tmp_path, "prun 1.0\n")
    for more, message in (
        (("--launch", "--mpirun", "/nowhere/mpirun"), "--mpirun /nowhere/mpirun: no such program"),
        (("--launch", "--mpirun", unknown), "says 'prun 1.0', which is neither Open MPI 4 or 5 nor MPICH"),
        (("--launch", "--in_process"), "--launch and --in_process exclude each other"),
        (("--hosts", "a,b"), "--hosts and --mpirun are of --launch"),
        (("--launch", "--hosts", "a,b,c"), "--hosts: 2 ranks cannot be dealt out evenly to 3 hosts"),
    ):
        said = here(*words, *more)
        assert (said.status, said.out) == (2, "")
        assert message in said.complaints[0]
