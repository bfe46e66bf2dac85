"""Greedy text and logits of engines of several ranks, run as processes under ``mpirun``, against the same model's on one rank.

    python -m moecompiler.tools.compare_ranks ROWS.json ENGINE_DIR ONE_RANK_DIR --model_dir DIR [--collectives auto host]

Each way of ``--collectives`` is a run of its own. Sums over ranks are added in another order than on one, so logits differ by
roundings; where texts part, it has to be at a tie (``compare_text``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
class Way:
    """What came of one ``--collectives``: ``said``, which way ranks exchanged what; the texts; and whether all are right."""

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


def judge(asked: str, prompts: Sequence[Sequence[int]], mine: Texts, one: Texts, said: str, tie: float) -> Way:
    """Texts that end early on one side are compared as far as both go."""
    rows = []
    for number, (prompt, (tokens, logits), (wanted, exact)) in enumerate(zip(prompts, mine, one, strict=True)):
        length = min(len(tokens), len(wanted))
        pair = (tokens[:length], logits[:length]), (wanted[:length], exact[:length])
        rows.append(compare(number, prompt, *pair, tie))
    notes = [line.removeprefix("note: ") for line in said.splitlines() if line.startswith("note: ")]
    return Way(asked, notes, rows, all(row.passed for row in rows))


def line(way: Way) -> str:
    """One line for people."""
    equal = sum(row.equal == row.length for row in way.rows)
    error = max((row.error_before for row in way.rows), default=0.0)
    head = (
        f"--collectives {way.asked}: {equal} of {len(way.rows)} texts are those of one rank, logits within {error:.4f}"
    )
    parted = [row for row in way.rows if row.equal < row.length]
    rest = f"; the others part at {'ties' if way.passed else 'MORE THAN TIES'}" if parted else ""
    return f"{head}{rest} ({'; '.join(way.said)})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of all rows")
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("one_rank_dir", type=Path)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--collectives", nargs="+", choices=[*Asked], default=["auto"], metavar="WAY")
    parser.add_argument("--prompts", type=int, choices=range(1, len(LENGTHS) + 1), default=4)
    parser.add_argument("--output_len", type=int, default=48)
    options = parser.parse_args(arguments)
    try:
        launcher_of(find_mpirun(None))
        job = Job.of(Artifact.open(options.engine_dir, ("engine",)))
        prompts = read_prompts(job, options.model_dir, options.prompts)
        one, _ = texts(options.one_rank_dir, prompts, options.output_len, ())
        ways = []
        for asked in options.collectives:
            words = ("--launch", "-v", "--collectives", str(asked))
            mine, said = texts(options.engine_dir, prompts, options.output_len, words)
            ways.append(judge(str(asked), prompts, mine, one, said, TIE[job.export.dtype]))
    except UserError as error:
        parser.error(str(error))
    for way in ways:
        print(line(way))
    write_json_atomic(options.output, {"ranks": job.mapping.world_size, "ways": [asdict(way) for way in ways]})
    return int(not all(way.passed for way in ways))


if __name__ == "__main__":
    sys.exit(main())
