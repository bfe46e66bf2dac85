"""Greedy text and logits of engines of several ranks, run as processes under ``mpirun``, against the same model's on one rank.

    python -m moecompiler.tools.compare_ranks ROWS.json ONE_RANK_DIR ENGINE_DIR ... --model_dir DIR [--collectives auto host]

Each way of ``--collectives`` is a run of its own; one that fails does not keep the others from running. Sums over ranks are added
in another order than on one, so logits differ by roundings; where texts part, it has to be at a tie (``compare_text``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from moecompiler.artifact import Artifact
from moecompiler.atomic import write_json_atomic
from moecompiler.errors import UserError
from moecompiler.runtime.outputs import write_tokens_csv
from moecompiler.runtime.prompts import PADDING
from moecompiler.runtime.ways import Asked
from moecompiler.tools.compare_text import LENGTHS, TIE, Row, compare, read_prompts
from moecompiler.tools.job import Job
from moecompiler.tools.launcher import find_mpirun, launcher_of

_SECONDS = 240.0
Texts = list[
    tuple[list[int], np.ndarray]
]  # of each prompt its new tokens, and the logits [steps, vocab] they were chosen from


@dataclass(frozen=True)
class Run:
    """What came of engines with one ``--collectives``: ``said``, which way ranks exchanged what, or why they failed; the texts;
    and whether all are right."""

    engine: str
    asked: str
    said: list[str]
    rows: list[Row]
    passed: bool


def texts(engine_dir: Path, prompts: Sequence[Sequence[int]], steps: int, words: Sequence[str]) -> tuple[Texts, str]:
    """What ``moecompiler run`` with ``words`` makes of the prompts, and its stderr. Raises: UserError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_tokens_csv(place / "prompts.csv", prompts)
        command = [sys.executable, "-m", "moecompiler.tools.main", "run", "--engine_dir", str(engine_dir)]
        command += ["--input_file", str(place / "prompts.csv"), "--max_output_len", str(steps)]
        command += ["--output_npy", str(place / "ids.npy"), "--output_logits_npy", str(place / "logits.npy"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            raise UserError(f"{' '.join(command[3:])}: exit status {done.returncode}: {done.stderr[-2000:]}")
        ids, logits = np.load(place / "ids.npy"), np.load(place / "logits.npy")
    rows = [row[row != PADDING].tolist() for row in ids]
    new = [row[len(prompt) :][:steps] for row, prompt in zip(rows, prompts, strict=True)]
    return [(tokens, part[: len(tokens)]) for tokens, part in zip(new, logits, strict=True)], done.stderr


def judge(prompts: Sequence[Sequence[int]], mine: Texts, one: Texts, tie: float) -> list[Row]:
    """Texts that end early on one side are compared as far as both go."""
    rows = []
    for number, (prompt, (tokens, logits), (wanted, exact)) in enumerate(zip(prompts, mine, one, strict=True)):
        length = min(len(tokens), len(wanted))
        pair = (tokens[:length], logits[:length]), (wanted[:length], exact[:length])
        rows.append(compare(number, prompt, *pair, tie))
    return rows


def line(run: Run) -> str:
    """One line for people."""
    head = f"{run.engine}, --collectives {run.asked}"
    if not run.rows:
        return f"{head}: FAILED: {'; '.join(run.said)}"
    equal = sum(row.equal == row.length for row in run.rows)
    error = max((row.error_before for row in run.rows), default=0.0)
    same = f"{equal} of {len(run.rows)} texts are those of one rank, logits within {error:.4f}"
    parted = f"; the others part at {'ties' if run.passed else 'MORE THAN TIES'}" if equal < len(run.rows) else ""
    return f"{head}: {same}{parted} ({'; '.join(run.said)})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of all rows")
    parser.add_argument("one_rank_dir", type=Path)
    parser.add_argument("engine_dirs", type=Path, nargs="+", metavar="ENGINE_DIR")
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--collectives", nargs="+", choices=[*Asked], default=["auto"], metavar="WAY")
    parser.add_argument("--prompts", type=int, choices=range(1, len(LENGTHS) + 1), default=4)
    parser.add_argument("--output_len", type=int, default=48)
    options = parser.parse_args(arguments)
    runs = []
    try:
        launcher_of(find_mpirun(None))
        job = Job.of(Artifact.open(options.one_rank_dir, ("engine",)))
        prompts = read_prompts(job, options.model_dir, options.prompts)
        one, _ = texts(options.one_rank_dir, prompts, options.output_len, ())
    except UserError as error:
        parser.error(str(error))
    for engine, asked in product(options.engine_dirs, options.collectives):
        try:
            words = ("--launch", "-v", "--collectives", str(asked))
            mine, said = texts(engine, prompts, options.output_len, words)
            rows = judge(prompts, mine, one, TIE[job.export.dtype])
            notes = [each.removeprefix("note: ") for each in said.splitlines() if each.startswith("note: ")]
            runs.append(Run(engine.name, str(asked), notes, rows, all(row.passed for row in rows)))
        except (UserError, subprocess.TimeoutExpired) as error:
            runs.append(Run(engine.name, str(asked), [str(error)], [], False))
        print(line(runs[-1]), flush=True)
    write_json_atomic(options.output, {"runs": [asdict(run) for run in runs]})
    passed = sum(run.passed for run in runs)
    print(f"{passed} of {len(runs)} runs on several ranks say what one rank says")
    return int(passed < len(runs))


if __name__ == "__main__":
    sys.exit(main())
