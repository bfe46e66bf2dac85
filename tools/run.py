"""Verb ``run``: text from engines, alone, under ``mpirun``, or with all ranks as threads."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moecompiler.artifact import Artifact
from moecompiler.backends.base import EngineLimits
from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator, on_one_rank
from moecompiler.runtime.connections import connected
from moecompiler.runtime.generation import Generation, GenerationOptions, check_request, generate
from moecompiler.runtime.outputs import check_writable, write_logits_npy, write_tokens_csv, write_tokens_npy
from moecompiler.runtime.places import places_of
from moecompiler.runtime.prompts import Tokenizer, load_tokenizer, read_prompts
from moecompiler.runtime.sampling import SamplingOptions
from moecompiler.runtime.session import StageSession, closing
from moecompiler.runtime.threads import run_in_threads
from moecompiler.runtime.watchdog import PATIENCE_SECONDS
from moecompiler.runtime.ways import Asked
from moecompiler.tools import options as opt
from moecompiler.tools.backend import open_backend
from moecompiler.tools.engine_dirs import directory_of, open_engines
from moecompiler.tools.job import Job
from moecompiler.tools.launched import run_launched
from moecompiler.tools.launcher import launch, parse_hosts
from moecompiler.tools.printing import TextPrinter, summary_line
from moecompiler.tools.together import together

_PROMPT, _CHOICE, _OUT, _HOW = "Prompts", "Choosing tokens", "Output files", "How to run"


@dataclass(frozen=True)
class Request:
    """What a run is asked for, the same on every rank."""

    engine_dir: Path
    input_text: tuple[str, ...]
    input_file: Path | None
    tokenizer_dir: Path | None
    max_output_len: int
    sampling: SamplingOptions
    output_npy: Path | None
    output_csv: Path | None
    output_logits_npy: Path | None
    summary_json: Path | None
    threads: int
    check_hashes: bool
    collectives: Asked = Asked.auto
    micro_batches: int | None = None
    verbose: bool = False


def run(
    context: typer.Context,
    engine_dir: opt.EngineDir,
    max_output_len: Annotated[int, typer.Option("--max_output_len", help="Most tokens to generate.")],
    input_text: Annotated[
        list[str] | None, typer.Option("--input_text", help="One or more prompts.", rich_help_panel=_PROMPT)
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input_file", help="Prompts: lines of text, or token ids in .csv or .npy.", rich_help_panel=_PROMPT
        ),
    ] = None,
    tokenizer_dir: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer_dir", help="Folder of the tokenizer (default: the engine's).", rich_help_panel=_PROMPT
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Divides the logits.", rich_help_panel=_CHOICE)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top_k", help="Choose among the k most likely.", rich_help_panel=_CHOICE)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top_p", help="Choose among the most likely that sum to p.", rich_help_panel=_CHOICE),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the choice.", rich_help_panel=_CHOICE)] = 0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition_penalty", help="Above 1: repeat less.", rich_help_panel=_CHOICE)
    ] = 1.0,
    output_npy: Annotated[
        Path | None, typer.Option("--output_npy", help="Token ids, prompt included.", rich_help_panel=_OUT)
    ] = None,
    output_csv: Annotated[
        Path | None, typer.Option("--output_csv", help="Token ids, prompt included.", rich_help_panel=_OUT)
    ] = None,
    output_logits_npy: Annotated[
        Path | None,
        typer.Option("--output_logits_npy", help="Logits of the generated steps, float32.", rich_help_panel=_OUT),
    ] = None,
    summary_json: Annotated[
        Path | None, typer.Option("--summary_json", help="Times and counts.", rich_help_panel=_OUT)
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in_process", help="All ranks as threads of this process.", rich_help_panel=_HOW)
    ] = False,
    threads: Annotated[
        int, typer.Option("--threads", help="CPU threads of each rank (0: cores shared out).", rich_help_panel=_HOW)
    ] = 0,
    check_hashes: Annotated[
        bool,
        typer.Option("--check_hashes/--no_check_hashes", help="Compare files with the manifest.", rich_help_panel=_HOW),
    ] = True,
    watchdog_s: opt.WatchdogS = PATIENCE_SECONDS,
    collectives: opt.Collectives = Asked.auto,
    micro_batches: opt.MicroBatches = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say which way ranks exchange what, and why.", rich_help_panel=_HOW)
    ] = False,
    start_ranks: Annotated[
        bool, typer.Option("--launch", help="Call mpirun, so that all ranks run.", rich_help_panel=_HOW)
    ] = False,
    hosts: Annotated[
        str | None, typer.Option("--hosts", help="With --launch: where: a,b or a:4,b:4.", rich_help_panel=_HOW)
    ] = None,
    mpirun: Annotated[
        Path | None,
        typer.Option("--mpirun", help="With --launch: which (default: beside Python, on PATH).", rich_help_panel=_HOW),
    ] = None,
) -> int:
    """Generate text with engines: alone, under `mpirun -n WORLD`, or with --launch, which calls mpirun."""
    sampling = SamplingOptions(temperature, top_k, top_p, seed, repetition_penalty)
    request = Request(
        engine_dir,
        tuple(input_text or ()),
        input_file,
        tokenizer_dir,
        max_output_len,
        sampling,
        output_npy,
        output_csv,
        output_logits_npy,
        summary_json,
        threads,
        check_hashes,
        collectives,
        micro_batches,
        verbose,
    )
    if not start_ranks and (hosts is not None or mpirun is not None):
        raise UserError("--hosts and --mpirun are of --launch, which calls mpirun: give it too")
    if start_ranks and in_process:
        raise UserError("--launch and --in_process exclude each other: ranks as processes, or as threads")
    if in_process or start_ranks:
        first = places_of([parse_hosts(hosts)[0].name if hosts else platform.node()])[0]
        world_size = Artifact.open(directory_of(engine_dir, first), ("engine",)).world_size
        if start_ranks:
            launch(context.obj, world_size, hosts, mpirun)
        run_in_threads(world_size, lambda each: run_rank(request, each))
        return 0
    run_launched(os.environ, lambda each: run_rank(request, each), watchdog_s)
    return 0


def run_rank(request: Request, communicator: Communicator) -> Generation:
    """One rank's whole run. Raises: UserError, on every rank, where any rank cannot do what is asked."""
    artifact, place = open_engines(request.engine_dir, communicator)
    job = Job.of(artifact)
    if communicator.world_size != job.mapping.world_size:
        raise UserError(
            f"{artifact.directory}: was compiled for {job.mapping.world_size} rank(s) ({job.mapping}), but"
            f" {communicator.world_size} run: start it with `mpirun -n {job.mapping.world_size}`, or with --in_process"
        )
    options = together(communicator, lambda: _generation_options(request, job, writes=communicator.rank == 0))
    threads = request.threads or share_of_cores(communicator)

    def load() -> StageSession:
        return load_rank(artifact, place.rank, threads, request.check_hashes, place.local_rank)

    with (
        closing(together(communicator, load)) as session,
        connected(request.collectives, communicator, job.mapping, session) as ways,
    ):
        for line in ways if request.verbose and communicator.rank == 0 else ():
            print(f"note: {line}", file=sys.stderr)
        return _run_loaded(request, artifact, communicator, job, options, session)


def _run_loaded(
    request: Request,
    artifact: Artifact,
    communicator: Communicator,
    job: Job,
    options: GenerationOptions,
    session: StageSession,
) -> Generation:
    tokenizers: list[Tokenizer] = []

    def tokenizer() -> Tokenizer:
        if not tokenizers:
            tokenizers.append(load_tokenizer(_tokenizer_dir(request, artifact), job.model.vocab_size))
        return tokenizers[0]

    pad_id = min(job.model.eos_token_ids, default=0)
    prompts = on_one_rank(
        communicator,
        0,
        lambda: read_prompts(request.input_text, request.input_file, tokenizer, job.model.vocab_size, pad_id),
    )
    check_request(session, communicator, job.mapping, prompts, options)  # before anything is printed
    printer = TextPrinter(prompts, tokenizers[0] if tokenizers else None) if communicator.rank == 0 else None
    result = generate(session, communicator, job.mapping, prompts, options, printer.show if printer else None)
    if printer:
        printer.finish()
        _write_outputs(request, prompts, result, pad_id)
    return result


def load_rank(
    artifact: Artifact, rank: int, threads: int, check_hashes: bool, device: int | None = None
) -> StageSession:
    """This rank's engine, its files checked first; on this GPU, counted from 0 on each host (default: of the rank's number)."""
    artifact.check([rank], hashes=check_hashes)
    backend = open_backend(artifact.header["backend"])
    limits = EngineLimits(**artifact.header["limits"])
    return backend.load(artifact.directory, f"rank{rank}", limits, threads, device=rank if device is None else device)


def share_of_cores(communicator: Communicator) -> int:
    """The cores this process may use, divided by the ranks that may use the same ones (`mpirun` can tie ranks to cores)."""
    cores = platform.node(), sorted(os.sched_getaffinity(0))
    return max(1, len(cores[1]) // communicator.gather_objects(cores).count(cores))


def _generation_options(request: Request, job: Job, writes: bool) -> GenerationOptions:
    for option in ("output_npy", "output_csv", "output_logits_npy", "summary_json"):
        if writes and (path := getattr(request, option)):
            check_writable(path, f"--{option}")
    keep_logits = request.output_logits_npy is not None
    return GenerationOptions(
        request.max_output_len, request.sampling, job.model.eos_token_ids, keep_logits, request.micro_batches
    )


def _tokenizer_dir(request: Request, artifact: Artifact) -> Path | None:
    if request.tokenizer_dir is not None:
        if not request.tokenizer_dir.is_dir():
            raise UserError(f"--tokenizer_dir {request.tokenizer_dir}: no such folder")
        return request.tokenizer_dir
    own = artifact.directory / "tokenizer"
    return own if own.is_dir() else None


def _write_outputs(request: Request, prompts: list[list[int]], result: Generation, pad_id: int) -> None:
    sequences = [prompt + output for prompt, output in zip(prompts, result.output_ids, strict=True)]
    if request.output_npy:
        write_tokens_npy(request.output_npy, sequences, pad_id)
    if request.output_csv:
        write_tokens_csv(request.output_csv, sequences)
    if request.output_logits_npy and result.logits is not None:
        write_logits_npy(request.output_logits_npy, result.logits)
    if request.summary_json:
        request.summary_json.write_text(json.dumps(summary(result), indent=2) + "\n")
    print(summary_line(summary(result)), file=sys.stderr)


def summary(result: Generation) -> dict[str, Any]:
    """Times in seconds, speeds in tokens per second, over all sequences of the batch."""
    return {
        "prompts": len(result.output_ids),
        "output_tokens": sum(map(len, result.output_ids)),
        "time_to_first_token_s": result.time_to_first_token_s,
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
    }
