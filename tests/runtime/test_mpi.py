from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchanges import CASES

from moecompiler.errors import UserError
from moecompiler.runtime import mpi
from moecompiler.runtime.communicator import Alone
from moecompiler.runtime.mpi import world
from moecompiler.runtime.threads import run_in_threads

SCRIPT = Path(__file__).with_name("exchanges.py")
pytestmark = pytest.mark.timeout(60)


def mpirun(ranks: int, case: str, folder: Path) -> subprocess.CompletedProcess[str]:
    launcher = Path(sys.executable).parent / "mpirun"
    command = [
        launcher,
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        str(ranks),
        sys.executable,
        SCRIPT,
        case,
        folder,
    ]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=50)


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, in dicts, lists and dataclasses too, times excepted."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            if not key.endswith("_s"):
                assert_same(one[key], other[key])
    elif isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif hasattr(one, "__dict__"):
        assert_same(vars(one), vars(other))
    else:
        assert one == other


@pytest.mark.mpi
@pytest.mark.parametrize(("case", "ranks"), [("collectives", 3), ("nccl", 3), ("tp2", 2), ("pp2", 2)])
def test_processes_and_threads_say_the_same_bits(case: str, ranks: int, tmp_path: Path) -> None:
    run = mpirun(ranks, case, tmp_path)
    assert run.returncode == 0, run.stderr
    in_processes = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]
    assert_same(in_processes, run_in_threads(ranks, CASES[case]))


@pytest.mark.mpi
def test_abort_ends_the_rank_that_waits(tmp_path: Path) -> None:
    start = time.monotonic()
    run = mpirun(2, "fail", tmp_path)
    assert time.monotonic() - start < 10
    assert run.returncode == 3
    assert "rank 1: rank 1 had enough" in run.stderr


@pytest.mark.mpi
def test_a_killed_rank_ends_the_one_that_waits(tmp_path: Path) -> None:
    start = time.monotonic()
    run = mpirun(2, "die", tmp_path)
    assert time.monotonic() - start < 10
    assert run.returncode not in (0, 3)
    assert "rank 1" in run.stdout + run.stderr
    assert not list(tmp_path.iterdir())


def test_without_a_launcher_there_is_no_mpi() -> None:
    # a batch script under SLURM is one process, whatever its variables say
    assert isinstance(world({"PATH": "/bin", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}), Alone)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "the launcher started 4 processes, but MPI sees 1"),
        ({"PMI_SIZE": "2"}, "the launcher started 2 processes, but MPI sees 1"),
        ({"PMIX_RANK": "3"}, "the launcher started at least 4 processes, but MPI sees 1"),
    ],
)
def test_the_launcher_of_another_mpi(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "MpiCommunicator", Alone)
    monkeypatch.setattr(mpi, "_library", lambda: "some MPI")
    with pytest.raises(UserError, match=message):
        world(variables)


@pytest.mark.mpi
def test_under_the_launcher_of_another_mpi_each_process_is_by_itself() -> None:
    script = "from moecompiler.runtime.mpi import world; world({'PMI_SIZE': '4'})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert run.returncode == 1
    assert "MPI sees 1: launcher and library differ (Open MPI" in run.stderr
