"""Ranks of ``run`` that fail at each of its moments, in each way: all end soon, and the cause is said once."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cli import ENDLESS_TOKENS, SOON, Output, ranks_of, started, wait_for

Engines = Callable[[str], Path]
pytestmark = [pytest.mark.xdist_group("watchdog"), pytest.mark.timeout(60)]
SCRIPT = Path(__file__).with_name("failing_rank.py")
WATCHDOG_S = 1.5

# which rank, when, how, and what is said of it
FAILURES = [
    (1, "load", "kill", "signal 9"),
    (1, "load", "memory", "rank 1 on {host} failed: MemoryError('out of memory'); ending all ranks"),
    (0, "prefill", "stop", "rank 0 on {host} has given no sign of life for"),
    (1, "decode", "hang", "rank 1 on {host} hangs: it has done nothing for"),
    (0, "collective", "kill", "signal 9"),
]


def run_and_fail(engine_dir: Path, folder: Path, victim: int, moment: str, way: str) -> Output:
    """Asserts that nothing of it is left, soon after the failure."""
    (folder / "prompt.csv").write_text("1,2,3\n")
    verb = ("run", "--engine_dir", engine_dir, "--max_output_len", ENDLESS_TOKENS, "--watchdog_s", WATCHDOG_S)
    program = (sys.executable, SCRIPT, victim, moment, way, folder, *verb, "--input_file", folder / "prompt.csv")
    with started(["mpirun", "-n", "2", *map(str, program)], folder) as launcher:
        deadline = time.monotonic() + 30
        while not (folder / "failing").exists():
            assert time.monotonic() < deadline, (folder / "err").read_text()
            time.sleep(0.01)
        ranks, failed = ranks_of(launcher, SCRIPT.name), time.monotonic()
        status = wait_for(launcher, 30)
        _, left = psutil.wait_procs(ranks.values(), SOON)
        assert not left
        assert time.monotonic() - failed < SOON
    return Output(status, (folder / "out").read_text(), (folder / "err").read_text())


@pytest.mark.mpi
@pytest.mark.parametrize(("victim", "moment", "way", "said"), FAILURES)
def test_all_ranks_end(victim: int, moment: str, way: str, said: str, engines: Engines, tmp_path: Path) -> None:
    output = run_and_fail(engines("endless"), tmp_path, victim, moment, way)
    assert output.status not in (0, 2)
    if way == "kill":  # mpirun says it
        assert f"rank {victim} with PID" in output.err.replace("\n", " ")
        assert output.err.count(said) == 1
        assert output.complaints == []
    else:
        (line,) = output.complaints
        assert said.format(host=platform.node()) in line
        assert output.err.count("Traceback") == (way == "memory")
