"""Verb ``bench``: how fast engines are, for given batches and lengths."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from moecompiler.artifact import Artifact
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.connections import connected
from moecompiler.runtime.generation import GenerationOptions, check_request, generate
from moecompiler.runtime.places import places_of
from moecompiler.runtime.sampling import SamplingOptions
from moecompiler.runtime.session import StageSession, closing
from moecompiler.runtime.threads import run_in_threads
from moecompiler.runtime.watchdog import PATIENCE_SECONDS
from moecompiler.runtime.ways import Asked
from moecompiler.tools import options as opt
from moecompiler.tools.engine_dirs import directory_of, open_engines
from moecompiler.tools.expert_load import RankLoad, check_backend, measure_load
from moecompiler.tools.job import Job
from moecompiler.tools.launched import run_launched
from moecompiler.tools.run import load_rank, share_of_cores
from moecompiler.tools.together import together


@dataclass(frozen=True)
class Case:
    """A request: sequences, and the tokens of each that go in and come out."""

    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True)
class Figures:
    """Medians over runs: seconds up to the first tokens, seconds from a step's tokens to the next one's (and the 90th percentile
    of all), decode tokens per second over the batch, and tokens in and out per second of the whole."""

    batch_size: int
    input_len: int
    output_len: int
    time_to_first_token_s: float
    step_s: float
    step_p90_s: float
    decode_tokens_per_s: float
    total_tokens_per_s: float


@dataclass(frozen=True)
class Request:
    """What is asked of every rank."""

    engine_dir: Path
    cases: tuple[Case, ...]
    runs: int
    warmup: int
    sampling: SamplingOptions
    threads: int
    check_hashes: bool
    expert_load: bool = False
    collectives: Asked = Asked.auto
    micro_batches: int | None = None


@dataclass(frozen=True)
class Measured:
    """Of one run of ``bench``. ``loads``: by case, each rank's share of the tokens, where that is asked for. ``ways``: in words,
    which way ranks exchange what, and why."""

    artifact: Artifact
    figures: list[Figures]
    loads: list[list[RankLoad]]
    ways: list[str]


def bench(
    engine_dir: opt.EngineDir,
    batch_size: Annotated[str, typer.Option("--batch_size", help="Sequences at once; several: 1,8,32.")] = "1",
    input_len: Annotated[str, typer.Option("--input_len", help="Tokens of a prompt; several: 128,2048.")] = "128",
    output_len: Annotated[str, typer.Option("--output_len", help="Tokens to generate; several by commas.")] = "32",
    runs: Annotated[int, typer.Option("--runs", min=1, help="How often each is measured.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="How often each runs unmeasured first.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the prompts' random tokens, and of the choice.")] = 0,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Divides the logits.")] = None,
    top_k: Annotated[int | None, typer.Option("--top_k", help="Choose among the k most likely.")] = None,
    top_p: Annotated[float | None, typer.Option("--top_p", help="Choose among the most likely that sum to p.")] = None,
    threads: Annotated[int, typer.Option("--threads", help="CPU threads of each rank (0: cores shared out).")] = 0,
    in_process: Annotated[bool, typer.Option("--in_process", help="All ranks as threads of this process.")] = False,
    check_hashes: Annotated[
        bool, typer.Option("--check_hashes/--no_check_hashes", help="Compare files with the manifest.")
    ] = True,
    expert_load: Annotated[
        bool, typer.Option("--expert_load", help="Also count the tokens of each rank's experts (backend onnxruntime).")
    ] = False,
    watchdog_s: opt.WatchdogS = PATIENCE_SECONDS,
    collectives: opt.Collectives = Asked.auto,
    micro_batches: opt.MicroBatches = None,
    output_json: Annotated[Path | None, typer.Option("--output_json", help="Also write the figures here.")] = None,
    as_json: opt.Json = False,
) -> int:
    """Measure engines: time to first token, latency of a step with the choice of its tokens, tokens per second; alone, or under
    `mpirun -n WORLD`."""
    lists = [
        _numbers(text, option)
        for text, option in ((batch_size, "--batch_size"), (input_len, "--input_len"), (output_len, "--output_len"))
    ]
    cases = tuple(Case(*sizes) for sizes in product(*lists))
    sampling = SamplingOptions(temperature, top_k, top_p, seed)
    request = Request(
        engine_dir, cases, runs, warmup, sampling, threads, check_hashes, expert_load, collectives, micro_batches
    )

    def rank(communicator: Communicator) -> None:
        measured = bench_engines(request, communicator)
        if communicator.rank == 0:
            _report(measured, output_json, as_json)

    if in_process:
        here = places_of([platform.node()])[0]
        run_in_threads(Artifact.open(directory_of(engine_dir, here), ("engine",)).world_size, rank)
    else:
        run_launched(os.environ, rank, watchdog_s)
    return 0


def bench_rank(request: Request, communicator: Communicator) -> list[Figures]:
    """As ``bench_engines``, the figures alone."""
    return bench_engines(request, communicator).figures


def bench_engines(request: Request, communicator: Communicator) -> Measured:
    """One rank's part: its engines and the figures. Raises: UserError, on every rank, where any rank cannot do what is asked."""
    artifact, place = open_engines(request.engine_dir, communicator)
    job = Job.of(artifact)
    if communicator.world_size != job.mapping.world_size:
        raise UserError(
            f"{artifact.directory}: was compiled for {job.mapping.world_size} rank(s), but {communicator.world_size} run:"
            f" start it with `mpirun -n {job.mapping.world_size}`, or with --in_process"
        )
    if request.expert_load:
        check_backend(artifact)
    threads = request.threads or share_of_cores(communicator)

    def load() -> StageSession:
        return load_rank(artifact, place.rank, threads, request.check_hashes, place.local_rank)

    with (
        closing(together(communicator, load)) as session,
        connected(request.collectives, communicator, job.mapping, session) as ways,
    ):
        for case in request.cases:
            _check_case(case, session, communicator, job.mapping)
        vocab_size = session.vocab_size
        figures = [_measure(case, request, session, communicator, job.mapping) for case in request.cases]
    loads = []
    for case in request.cases if request.expert_load else ():
        prompts, options = _prompts(case, request, vocab_size), _options(case, request)
        loads.append(measure_load(artifact, communicator, threads, prompts, options))
    return Measured(artifact, figures, loads, ways)


def _check_case(case: Case, session: StageSession, communicator: Communicator, mapping: Mapping) -> None:
    if case.batch_size > session.max_batch_size:
        raise UserError(
            f"--batch_size {case.batch_size}: the engine's max_batch_size is {session.max_batch_size}; compile with a larger"
        )
    check_request(session, communicator, mapping, [[0] * case.input_len], GenerationOptions(case.output_len))


@dataclass(frozen=True)
class _Clock:
    """When each step's tokens came."""

    times: list[float]

    def note(self, step: int, tokens: dict[int, int]) -> None:
        self.times.append(perf_counter())


def _measure(
    case: Case, request: Request, session: StageSession, communicator: Communicator, mapping: Mapping
) -> Figures:
    """Runs a case ``warmup + runs`` times; no token ends a sequence early."""
    prompts = _prompts(case, request, session.vocab_size)
    options = _options(case, request)
    first: list[float] = []
    whole: list[float] = []
    steps: list[float] = []
    for run in range(request.warmup + request.runs):
        clock = _Clock([])
        result = generate(session, communicator, mapping, prompts, options, clock.note)
        if run >= request.warmup:
            first.append(result.prefill_s)
            whole.append(result.prefill_s + result.decode_s)
            steps += [after - before for before, after in pairwise(clock.times)]
    step = median(steps) if steps else 0.0
    return Figures(
        **asdict(case),
        time_to_first_token_s=median(first),
        step_s=step,
        step_p90_s=quantiles(steps, n=10)[-1] if len(steps) > 1 else step,
        decode_tokens_per_s=case.batch_size / step if step else 0.0,
        total_tokens_per_s=case.batch_size * (case.input_len + case.output_len) / median(whole),
    )


def _options(case: Case, request: Request) -> GenerationOptions:
    return GenerationOptions(case.output_len, request.sampling, micro_batches=request.micro_batches)


def _prompts(case: Case, request: Request, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(request.sampling.seed)
    prompts: list[list[int]] = rng.integers(0, vocab_size, (case.batch_size, case.input_len)).tolist()
    return prompts


def _numbers(text: str, option: str) -> list[int]:
    """``1,8,32``. Raises: UserError where it is no list of positive whole numbers."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option} {text!r}: give whole numbers above 0, joined by commas")
    return numbers


def _report(measured: Measured, output_json: Path | None, as_json: bool) -> None:
    artifact, results = measured.artifact, measured.figures
    data: dict[str, Any] = {
        "backend": artifact.header.get("backend"),
        "runtime": artifact.header.get("runtime"),
        "mapping": artifact.header["mapping"],
        "dtype": artifact.header["export"]["dtype"],
        "ways": measured.ways,
        "figures": [asdict(each) for each in results],
    } | {key: artifact.header[key] for key in ("made",) if key in artifact.header}
    if measured.loads:
        data["expert_load"] = [[asdict(each) for each in loads] for loads in measured.loads]
    if output_json is not None:
        try:
            output_json.write_text(json.dumps(data, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--output_json {output_json}: cannot be written: {error.strerror}") from None
    if as_json:
        print(json.dumps(data, indent=2))
        return
    for line in measured.ways:
        print(line)
    table = Table("batch", "in", "out", "first, ms", "step, ms", "p90, ms", "decode/s", "all/s")
    for each in results:
        times = (each.time_to_first_token_s, each.step_s, each.step_p90_s)
        table.add_row(
            *(str(size) for size in (each.batch_size, each.input_len, each.output_len)),
            *(f"{seconds * 1e3:.3f}" for seconds in times),
            f"{each.decode_tokens_per_s:.1f}",
            f"{each.total_tokens_per_s:.1f}",
        )
    Console().print(table)
    for figures, loads in zip(results, measured.loads, strict=False):
        _print_loads(figures, loads)


def _print_loads(case: Figures, loads: Sequence[RankLoad]) -> None:
    title = f"tokens of experts, batch {case.batch_size}, {case.input_len} in, {case.output_len} out"
    table = Table("rank", "experts", "tokens", "of each", "imbalance", title=title, title_justify="left")
    for each in loads:
        first, last = each.experts
        of_each = " ".join(map(str, each.per_expert))
        table.add_row(str(each.rank), f"{first}-{last}", str(each.tokens), of_each, f"{each.imbalance:.2f}")
    Console().print(table)
