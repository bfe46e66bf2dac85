"""All that needs a GPU and TensorRT, by one command: what is right, then how fast it is.

    python tools/gpu_check.py --output_dir DIR [--only NAMES] [--skip NAMES] [--jobs N] [--minutes M] [--list]

``NAMES``: steps or groups (``correctness``, ``figures``, ``quantized``, ``ranks``), patterns such as ``validate-*`` too, joined
by commas; what a step of ``--only`` needs is run as well, unless ``--skip`` names it. Goes on after a failure, and prints a line
per step. In ``DIR``: ``summary.json``, what became of each; ``figures.json``, all that was measured; ``logs.tar.gz``, what each
said. Engines stay in ``--work_dir``, where the next run finds them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moecompiler.atomic import write_json_atomic
from moecompiler.errors import UserError
from moecompiler.runtime.device import driver
from moecompiler.tools.gpu_rank_steps import rank_steps
from moecompiler.tools.gpu_schedule import FAILED, OK, SKIPPED, Outcome, Runner, Step, check, run_steps
from moecompiler.tools.gpu_steps import Places, all_steps

ROOT = Path(__file__).resolve().parents[1]


def every_step(places: Places) -> list[Step]:
    """In the order in which they begin."""
    return [*all_steps(places), *rank_steps(places)]


def select(steps: Sequence[Step], only: str, skip: str) -> list[Step]:
    """Those of ``only`` (all) with what they need, without those of ``skip``. Raises: ValueError where a name fits none."""
    wanted = (
        {step.name for step in steps} if not only else set().union(*(_fitting(steps, word) for word in _words(only)))
    )
    unwanted = set().union(*(_fitting(steps, word) for word in _words(skip)))
    for step in reversed(steps):  # what is needed comes before
        if step.name in wanted - unwanted:
            wanted |= set(step.needs)
    return [step for step in steps if step.name in wanted - unwanted]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _fitting(steps: Sequence[Step], word: str) -> set[str]:
    found = {step.name for step in steps if fnmatch(step.name, word) or step.group == word}
    if not found:
        raise ValueError(f"no step or group is called {word}; --list shows them")
    return found


def line(outcome: Outcome) -> str:
    """One line for people."""
    mark = {OK: "ok  ", SKIPPED: "SKIP", FAILED: "FAIL"}.get(outcome.state, "TIME")
    return f"{mark} {outcome.name:28} {outcome.seconds:4.0f} s  {outcome.last[:150]}"


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    states = [each.state for each in outcomes]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "seconds": round(seconds, 1),
        "counts": {state: states.count(state) for state in sorted(set(states))},
        "steps": [asdict(each) for each in outcomes],
    }


def figures(folder: Path, steps: Sequence[Step]) -> dict[str, Any]:
    """What the steps measured, by their names; of one that was cut short nothing."""
    found = {}
    for step in steps:
        path = folder / f"{step.name}.json"
        if path.is_file():
            try:
                found[step.name] = json.loads(path.read_text())
            except ValueError:
                found[step.name] = None
    return found


def pack_logs(path: Path, logs: Path, steps: Sequence[Step]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for step in steps:
            if (log := logs / f"{step.name}.log").is_file():
                archive.add(log, f"logs/{log.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="where summary, figures and logs go")
    default = Path(tempfile.gettempdir()) / "moecompiler-gpu-check"
    parser.add_argument("--work_dir", type=Path, default=default, help="where engines go (default: %(default)s)")
    parser.add_argument("--only", default="", help="steps, groups or patterns")
    parser.add_argument("--skip", default="", help="steps, groups or patterns")
    parser.add_argument("--jobs", type=int, default=8, help="steps at once, of those that are not timed (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="what is not done by then is left (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    options = parser.parse_args(arguments)
    places = Places(ROOT, options.work_dir.absolute())
    try:
        steps = select(every_step(places), options.only, options.skip)
    except ValueError as error:
        parser.error(str(error))
    check(every_step(places))
    if options.list:
        for step in steps:
            print(f"{step.name:28} {step.group:12} {step.seconds:4} s at most  {', '.join(step.needs)}")
        return 0
    if options.output_dir is None or options.jobs < 1 or options.minutes <= 0:
        parser.error("give --output_dir DIR, --jobs of at least 1 and --minutes above 0")
    try:
        driver()
    except UserError as error:
        parser.error(str(error))
    return run(steps, places, options.output_dir, options.jobs, options.minutes)


def run(steps: Sequence[Step], places: Places, output_dir: Path, jobs: int, minutes: float) -> int:
    for folder in (output_dir, places.logs, places.figures, places.engines):
        folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (places.figures / f"{step.name}.json").unlink(missing_ok=True)
        (places.logs / f"{step.name}.log").unlink(missing_ok=True)
    begin = time.monotonic()
    runner = Runner(places.root, places.logs, os.environ, begin + 60 * minutes, jobs)
    before = {each: signal.signal(each, lambda *_: runner.stop()) for each in (signal.SIGINT, signal.SIGTERM)}
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(line(outcome), flush=True)
        write_json_atomic(output_dir / "summary.json", summary(outcomes, time.monotonic() - begin))
        write_json_atomic(output_dir / "figures.json", figures(places.figures, steps))

    try:
        run_steps(steps, jobs, runner, report)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        pack_logs(output_dir / "logs.tar.gz", places.logs, steps)
    counts = summary(outcomes, 0)["counts"]
    print(f"{', '.join(f'{n} {state}' for state, n in counts.items())} in {time.monotonic() - begin:.0f} s", flush=True)
    return int(any(each.state != OK for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
