"""Steps that are commands: which run at once, which wait for others, what becomes of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"
_LEAST_SECONDS = 5.0  # with less left no step is begun


@dataclass(frozen=True)
class Step:
    """``command`` may take ``seconds``. ``needs``: steps that have to end well first. ``alone``: nothing runs beside it, and all
    that is not alone has run. ``removes``: directories that go when it has ended."""

    name: str
    group: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()
    alone: bool = False
    removes: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """``state``: ``ok``, ``failed``, ``timed out`` or ``skipped``; ``status``: the exit status, None where it did not run;
    ``last``: the last line that it wrote, or why it was skipped."""

    name: str
    state: str
    status: int | None
    seconds: float
    last: str


def check(steps: Sequence[Step]) -> None:
    """Raises: ValueError where a name is there twice, or a step needs one that does not come before it."""
    before: dict[str, Step] = {}
    for step in steps:
        if step.name in before:
            raise ValueError(f"two steps are called {step.name}")
        for name in step.needs:
            if name not in before:
                raise ValueError(f"step {step.name} needs {name}, which is no step before it")
            if before[name].alone and not step.alone:
                raise ValueError(f"step {step.name} needs {name}, which runs alone and so after it")
        before[step.name] = step


def run_steps(
    steps: Sequence[Step],
    jobs: int,
    run: Callable[[Step], Outcome],
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Runs those that are not alone, ``jobs`` at a time, the earlier ones first, then the others one by one. A step of which a
    needed one did not end well is skipped; needed steps that are not among ``steps`` are taken for done. ``report`` is called
    here, in the order in which steps end."""
    names = {step.name for step in steps}
    done: dict[str, Outcome] = {}

    def end(outcome: Outcome) -> None:
        done[outcome.name] = outcome
        report(outcome)

    for alone, width in ((False, jobs), (True, 1)):
        waiting = [step for step in steps if step.alone == alone]
        running: dict[Future[Outcome], Step] = {}
        with ThreadPoolExecutor(width) as pool:
            while waiting or running:
                for step in list(waiting):
                    missing = [name for name in step.needs if name in names and name not in done]
                    bad = [name for name in step.needs if name in done and done[name].state != OK]
                    if bad:
                        waiting.remove(step)
                        end(Outcome(step.name, SKIPPED, None, 0.0, f"needs {bad[0]}, which {_became(done[bad[0]])}"))
                    elif not missing and len(running) < width:
                        waiting.remove(step)
                        running[pool.submit(run, step)] = step
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    del running[future]
                    end(future.result())
    return list(done.values())


def _became(outcome: Outcome) -> str:
    return "was skipped" if outcome.state == SKIPPED else outcome.state


class Runner:
    """Runs a step's command in ``directory``, its output in ``logs/NAME.log``; nothing goes on after ``deadline`` (by
    ``time.monotonic``). ``jobs``: how many run at once and share the cores."""

    def __init__(self, directory: Path, logs: Path, environment: Mapping[str, str], deadline: float, jobs: int):
        self._directory, self._logs, self._environment = directory, logs, environment
        self._deadline, self._jobs = deadline, jobs
        self._running: set[subprocess.Popen[bytes]] = set()

    def __call__(self, step: Step) -> Outcome:
        begin = time.monotonic()
        left = self._deadline - begin
        if left < _LEAST_SECONDS:
            return Outcome(step.name, SKIPPED, None, 0.0, "no time is left")
        log = self._logs / f"{step.name}.log"
        cores = os.cpu_count() or 1
        threads = cores if step.alone else max(1, cores // self._jobs)
        environment = {**self._environment, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        try:
            status = self._run(step.command, log, min(step.seconds, left), environment)
        except OSError as error:
            log.write_text(f"{error}\n")
            status = 127
        for directory in step.removes:
            shutil.rmtree(directory, ignore_errors=True)
        state = OK if status == 0 else TIMED_OUT if status is None else FAILED
        return Outcome(step.name, state, status, time.monotonic() - begin, last_line(log))

    def stop(self) -> None:
        """Ends what runs; what has not begun is skipped."""
        self._deadline = 0.0
        for process in list(self._running):
            _kill(process)

    def _run(self, command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str]) -> int | None:
        """The exit status; None where it took more than ``seconds``, and was killed with all that it had started."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=environment,
                start_new_session=True,
            )
            self._running.add(process)
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                self._running.discard(process)
                _kill(process)
                process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started and left running."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
