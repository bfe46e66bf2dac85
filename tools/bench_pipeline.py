"""How pipeline stages overlap: engines with stages, the same batch undivided and in micro-batches, in turn.

    mpirun -n 2 python -m moecompiler.tools.bench_pipeline OUTPUT.json ENGINE_DIR [--micro_batches 1 2 4]

Without ``mpirun`` ranks are threads. ``most``: what stages that take as long as one another, and rows that take as long as one
another, could gain over a batch that is undivided, so that one stage works and the others wait: with m micro-batches in p stages,
p·m / (p + m - 1) in prefill, and min(m, p) in decode, where the next step fills what the last one leaves.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table

from moecompiler.artifact import Artifact
from moecompiler.atomic import write_json_atomic
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.connections import connected
from moecompiler.runtime.generation import GenerationOptions, OnTokens, generate
from moecompiler.runtime.session import StageSession, closing
from moecompiler.runtime.threads import run_in_threads
from moecompiler.runtime.ways import Asked
from moecompiler.tools.engine_dirs import open_engines
from moecompiler.tools.job import Job
from moecompiler.tools.launched import run_launched
from moecompiler.tools.printing import USER_ERROR, complaint
from moecompiler.tools.run import load_rank
from moecompiler.tools.together import together


@dataclass(frozen=True)
class Row:
    """Medians in seconds; gains over the first row, which is of a batch that is undivided, and the most that they could be."""

    micro_batches: int
    prefill_s: float
    step_s: float
    prefill_gain: float
    step_gain: float
    most_in_prefill: float
    most_in_decode: float


@dataclass(frozen=True)
class Request:
    """What is measured: ``micro_batches`` in turn, ``runs`` times."""

    engine_dir: Path
    batch_size: int
    input_len: int
    output_len: int
    micro_batches: tuple[int, ...]
    runs: int
    threads: int
    collectives: Asked


@dataclass(frozen=True)
class Result:
    """``ways``: in words, which way what goes; ``same_tokens``: whether every division gave the same."""

    mapping: Mapping
    ways: list[str]
    rows: list[Row]
    same_tokens: bool


def measure(request: Request, communicator: Communicator) -> Result:
    """One rank's part. Raises: UserError, on every rank, where what is asked for cannot be measured."""
    artifact, place = open_engines(request.engine_dir, communicator)
    mapping = Job.of(artifact).mapping
    if mapping.pp_size == 1:
        raise UserError(f"{request.engine_dir}: has one stage; compile with --pp_size 2 or more")

    def load() -> StageSession:
        return load_rank(artifact, place.rank, request.threads, False, place.local_rank)

    with (
        closing(together(communicator, load)) as session,
        connected(request.collectives, communicator, mapping, session) as ways,
    ):
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, session.vocab_size, (request.batch_size, request.input_len)).tolist()
        prefills: dict[int, list[float]] = {count: [] for count in request.micro_batches}
        steps: dict[int, list[float]] = {count: [] for count in request.micro_batches}
        said = []
        for run in range(request.runs + 1):  # the first is not counted
            for count in request.micro_batches:
                times: list[float] = []
                result = generate(
                    session,
                    communicator,
                    mapping,
                    prompts,
                    GenerationOptions(request.output_len, micro_batches=count),
                    _noting(times),
                )
                said.append(result.output_ids)
                if run:
                    prefills[count].append(result.prefill_s)
                    steps[count] += [after - before for before, after in pairwise(times)]
    medians = {count: (median(prefills[count]), median(steps[count])) for count in request.micro_batches}
    rows = [_row(count, medians, mapping.pp_size) for count in request.micro_batches]
    return Result(mapping, ways, rows, all(each == said[0] for each in said))


def _noting(times: list[float]) -> OnTokens:
    """Notes when each step's tokens come."""
    return lambda step, tokens: times.append(perf_counter())


def _row(count: int, medians: dict[int, tuple[float, float]], stages: int) -> Row:
    (prefill, step), (prefill_before, step_before) = medians[count], medians[1]
    most = stages * count / (stages + count - 1), float(min(count, stages))
    return Row(count, prefill, step, prefill_before / prefill, step_before / step, *most)


def report(request: Request, result: Result) -> None:
    console = Console()
    for line in result.ways:
        console.print(line, highlight=False)
    sizes = f"batch {request.batch_size}, {request.input_len} in, {request.output_len} out"
    table = Table("micro-batches", "prefill, ms", "gain", "most", "step, ms", "gain", "most", title=sizes)
    for row in result.rows:
        figures = (row.prefill_gain, row.most_in_prefill, row.step_gain, row.most_in_decode)
        gains = [f"{value:.2f}" for value in figures]
        times = f"{row.prefill_s * 1e3:.2f}", f"{row.step_s * 1e3:.3f}"
        table.add_row(str(row.micro_batches), times[0], *gains[:2], times[1], *gains[2:])
    console.print(table)
    console.print(f"same tokens: {'yes' if result.same_tokens else 'NO'}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of the result")
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--input_len", type=int, default=128)
    parser.add_argument("--output_len", type=int, default=32, help="2 or more")
    parser.add_argument(
        "--micro_batches", type=int, nargs="+", default=[2, 4], help="beside 1, which is always measured"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU for each rank")
    parser.add_argument("--collectives", type=Asked, choices=list(Asked), default=Asked.auto)
    options = parser.parse_args(arguments)
    sizes = (options.batch_size, options.input_len, options.output_len - 1, options.runs, *options.micro_batches)
    if min(sizes) < 1:
        parser.error("sizes are 1 or more, and --output_len 2 or more")
    counts = tuple(dict.fromkeys((1, *options.micro_batches)))
    request = Request(
        options.engine_dir,
        options.batch_size,
        options.input_len,
        options.output_len,
        counts,
        options.runs,
        options.threads,
        options.collectives,
    )

    def rank(communicator: Communicator) -> None:
        if communicator.world_size == 1:
            world = Artifact.open(request.engine_dir, ("engine",)).world_size
            result = run_in_threads(world, lambda each: measure(request, each))[0]
        else:
            result = measure(request, communicator)
        if communicator.rank == 0:
            report(request, result)
            write_json_atomic(options.output, asdict(result))

    try:
        run_launched(os.environ, rank)
    except UserError as error:
        print(complaint(str(error)), file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
