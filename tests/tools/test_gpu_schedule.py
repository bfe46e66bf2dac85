"""Steps that are commands: order, dependencies, failures, limits, what runs at once."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from moecompiler.tools.gpu_schedule import FAILED, OK, SKIPPED, TIMED_OUT, Outcome, Runner, Step, check, run_steps


def step(name: str, *needs: str, alone: bool = False) -> Step:
    return Step(name, "group", ("true",), 10, needs, alone)


class Recorded:
    """Runs nothing; knows what ran and what ran beside it. ``fails``: names of steps that do not end well."""

    def __init__(self, *fails: str, seconds: float = 0.0):
        self.fails, self.seconds = fails, seconds
        self.lock, self.running = threading.Lock(), set[str]()
        self.began: list[str] = []
        self.beside: dict[str, int] = {}

    def __call__(self, step: Step) -> Outcome:
        with self.lock:
            self.began.append(step.name)
            self.running.add(step.name)
            for name in self.running:
                self.beside[name] = max(self.beside.get(name, 0), len(self.running) - 1)
        time.sleep(self.seconds)
        with self.lock:
            self.running.discard(step.name)
        bad = step.name in self.fails
        return Outcome(step.name, FAILED if bad else OK, int(bad), 0.0, "")


def states(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in outcomes}


def test_a_failure_skips_only_what_needs_it() -> None:
    steps = [step("a"), step("b", "a"), step("c", "b"), step("d")]
    record, reported = Recorded("a"), list[str]()
    outcomes = run_steps(steps, 1, record, lambda outcome: reported.append(outcome.name))
    assert states(outcomes) == {"a": FAILED, "b": SKIPPED, "c": SKIPPED, "d": OK}
    assert record.began == ["a", "d"]
    assert [outcome.last for outcome in outcomes if outcome.state == SKIPPED] == [
        "needs a, which failed",
        "needs b, which was skipped",
    ]
    assert reported == [outcome.name for outcome in outcomes]


def test_steps_run_at_once_but_not_those_that_are_alone() -> None:
    names = [f"s{i}" for i in range(5)]
    steps = [step("timed", alone=True), *map(step, names), step("timed too", "timed", alone=True)]
    record = Recorded(seconds=0.03)
    assert set(states(run_steps(steps, 3, record)).values()) == {OK}
    assert max(record.beside[name] for name in names) == 2
    assert record.beside["timed"] == record.beside["timed too"] == 0
    assert record.began[-2:] == ["timed", "timed too"]


def test_what_waits_does_not_block_and_the_earlier_goes_first() -> None:
    """As soon as a step can run it goes before those behind it."""
    steps = [step("a"), step("after a", "a"), step("b"), step("c")]
    record = Recorded()
    run_steps(steps, 1, record)
    assert record.began == ["a", "after a", "b", "c"]


def test_a_need_that_is_not_there_counts_as_done() -> None:
    record = Recorded()
    assert states(run_steps([step("b", "a")], 2, record)) == {"b": OK}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("a"), step("a")], "two steps"),
        ([step("a", "b"), step("b")], "no step before it"),
        ([step("a", alone=True), step("b", "a")], "runs alone"),
    ],
)
def test_orders_that_cannot_be(steps: list[Step], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(steps)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


@pytest.fixture
def runner(tmp_path: Path) -> Callable[[float], Runner]:
    return lambda seconds: Runner(tmp_path, tmp_path, {**os.environ, "MARK": "here"}, time.monotonic() + seconds, 4)


def run(runner: Runner, *code: str, seconds: int = 20, removes: tuple[Path, ...] = ()) -> Outcome:
    return runner(Step("it", "group", python(";".join(code)), seconds, removes=removes))


def test_a_command_is_logged(runner: Callable[[float], Runner], tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    code = ("import os", "print(os.environ['MARK'], os.environ['OMP_NUM_THREADS'])", "os.write(2, b'last\\n\\n')")
    outcome = run(runner(60), *code, removes=(tmp_path / "engine",))
    assert (outcome.state, outcome.status, outcome.last) == (OK, 0, "last")
    assert (tmp_path / "it.log").read_text().startswith(f"here {max(1, (os.cpu_count() or 1) // 4)}\n")
    assert not (tmp_path / "engine").exists()


def test_a_failing_command(runner: Callable[[float], Runner]) -> None:
    outcome = run(runner(60), "print('why')", "raise SystemExit(3)")
    assert (outcome.state, outcome.status, outcome.last) == (FAILED, 3, "why")
    outcome = runner(60)(Step("none", "group", ("/no/such/program",), 5))
    assert (outcome.state, outcome.status) == (FAILED, 127)
    assert "/no/such/program" in outcome.last


def test_a_command_that_takes_too_long_is_killed_with_its_children(
    runner: Callable[[float], Runner], tmp_path: Path
) -> None:
    """A child that outlives its parent would go on using the GPU."""
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-S', '-c', {child!r}])"
    begin = time.monotonic()
    outcome = run(runner(60), code, "print(p.pid, flush=True)", "p.wait()", seconds=1)
    assert outcome.state == TIMED_OUT
    assert outcome.status is None
    assert time.monotonic() - begin < 20
    for _ in range(100):
        if not runs(int(outcome.last)):
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_nothing_begins_when_time_is_up(runner: Callable[[float], Runner]) -> None:
    outcome = run(runner(1), "print('no')")
    assert (outcome.state, outcome.last) == (SKIPPED, "no time is left")


def test_stop_ends_what_runs(runner: Callable[[float], Runner]) -> None:
    this = runner(60)
    threading.Timer(0.3, this.stop).start()
    begin = time.monotonic()
    outcomes = run_steps([Step(name, "g", python("import time; time.sleep(30)"), 40) for name in "ab"], 1, this)
    assert states(outcomes) == {"a": FAILED, "b": SKIPPED}
    assert time.monotonic() - begin < 20
