"""Verb ``validate``: engines against PyTorch, rank by rank and recombined."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moecompiler.artifact import Artifact
from moecompiler.atomic import write_json_atomic
from moecompiler.backends.base import Backend, EngineLimits
from moecompiler.errors import UserError
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantized import formats_of, without
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.outputs import check_writable
from moecompiler.runtime.threads import run_in_threads
from moecompiler.runtime.ways import Asked
from moecompiler.tools import options as opt
from moecompiler.tools.backend import open_backend
from moecompiler.tools.job import Job
from moecompiler.tools.launched import run_launched
from moecompiler.tools.text import encode_text
from moecompiler.tools.together import together

if TYPE_CHECKING:
    from moecompiler.validation.validate import Report

OUT_OF_TOLERANCE = 1
_PATIENCE_SECONDS = 60.0  # of ranks that load PyTorch's modules, with Python's lock held


@dataclass(frozen=True)
class Request:
    """What is asked of every rank. ``text_ids``: token ids of real text, empty without a tokenizer."""

    directory: Path
    text_ids: tuple[int, ...]
    tokens: int
    against_hf: bool
    every_part: bool
    seed: int
    collectives: Asked = Asked.auto


def validate(
    directory: Annotated[Path, typer.Argument(help="What `compile` or `build` wrote.")],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", help="Text to measure on (default: heldout.txt beside the checkpoint, or Python's own)."
        ),
    ] = None,
    tokenizer_dir: Annotated[
        Path | None, typer.Option("--tokenizer_dir", help="Folder of the tokenizer (default: the engine's).")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="About how many tokens of the text to run.")] = 1024,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also compare every layer's attention and MoE alone.")
    ] = False,
    hf: Annotated[
        bool, typer.Option("--hf/--no_hf", help="Compare the ranks together with Hugging Face's model.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random tokens.")] = 0,
    collectives: opt.Collectives = Asked.auto,
    output_json: Annotated[Path | None, typer.Option("--output_json", help="Also write the report here.")] = None,
    as_json: opt.Json = False,
) -> int:
    """Compare engines with PyTorch: outputs of every rank, logits and perplexity of all, and the layer where they part."""
    artifact = Artifact.open(directory, ("engine",))
    artifact.check()
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: give 1 or more")
    if output_json is not None:
        check_writable(output_json, "--output_json")
    notes: list[str] = []
    against_hf = hf and _fits(Job.of(artifact), notes)
    text_ids = encode_text(artifact, text, tokenizer_dir, notes)
    request = Request(directory, tuple(text_ids), tokens, against_hf, layers, seed, collectives)
    errors = Console(stderr=True)

    def whole(communicator: Communicator) -> Report:
        with errors.status("comparing engines with PyTorch") if errors.is_terminal else nullcontext():
            report = _validate(request, artifact, communicator)
        if communicator.rank == 0:
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
            if output_json is not None:
                write_json_atomic(output_json, report.to_json())
            if as_json:
                print(json.dumps(report.to_json(), indent=2))
            else:
                print_report(Console(), report)
        return report

    return 0 if run_launched(os.environ, whole, _PATIENCE_SECONDS).passed else OUT_OF_TOLERANCE


def _validate(request: Request, artifact: Artifact, communicator: Communicator) -> Report:
    """As this rank of ``mpirun``, or with all ranks as threads of this process."""
    if communicator.world_size == 1:
        return run_in_threads(artifact.world_size, lambda each: validate_with(request, artifact, each))[0]
    if communicator.world_size != artifact.world_size:
        raise UserError(
            f"{request.directory}: was compiled for {artifact.world_size} rank(s), but {communicator.world_size} run:"
            f" start it with `mpirun -n {artifact.world_size}`, or without mpirun"
        )
    return validate_with(request, artifact, communicator)


def validate_with(request: Request, artifact: Artifact, communicator: Communicator) -> Report:
    """One rank's part; every rank returns the whole report."""
    import torch

    from moecompiler.dummy import open_source
    from moecompiler.validation.place import RankPlace
    from moecompiler.validation.scenario import random_scenario, text_scenario
    from moecompiler.validation.tolerances import TOLERANCES, for_formats
    from moecompiler.validation.validate import validate_rank

    job, limits = Job.of(artifact), EngineLimits(**artifact.header["limits"])
    threads = max(1, torch.get_num_threads() // artifact.world_size)
    reader = together(communicator, lambda: open_source(job.source, job.model, threads))
    scenarios = [random_scenario(limits, request.seed)]
    if real := text_scenario(request.text_ids, limits, request.tokens):
        scenarios.append(real)
    backend = open_backend(artifact.header["backend"])
    return validate_rank(
        artifact,
        backend,
        RankPlace(job.model, job.mapping, job.export, communicator.rank, quantization_of(artifact, communicator.rank)),
        reader,
        scenarios,
        for_formats(
            TOLERANCES[_computed(artifact, communicator.rank, backend)],
            formats_of(job.quantization),
            cache=job.quantization is not None and job.quantization.cache is not None,
        ),
        communicator,
        against_hf=request.against_hf,
        every_part=request.every_part,
        threads=1 if artifact.world_size > 1 else 0,
        collectives=request.collectives,
    )


def _computed(artifact: Artifact, rank: int, backend: Backend) -> str:
    """The dtype whose rounding an engine has: plugins compute in the graph's."""
    dtype = Job.of(artifact).export.dtype
    return dtype if artifact.rank_info(rank).get("engine", {}).get("plugins") else backend.compute_dtype(dtype)


def quantization_of(artifact: Artifact, rank: int) -> QuantizationRecipe | None:
    """How the weights of a rank's engine are quantized: as was asked for, but for those that passes did not find."""
    recipe = Job.of(artifact).quantization
    kept = artifact.rank_info(rank).get("quantized", {}).get("kept", ())
    return None if recipe is None else without(recipe, kept)


def _fits(job: Job, notes: list[str]) -> bool:
    """Whether HF's model, in float32, fits into the memory that is free; says so where it does not."""
    from math import prod

    from moecompiler.checkpoint import expected_tensors

    needed = 4 * sum(prod(shape) for shape in expected_tensors(job.model).values())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        notes.append(f"HF's model takes {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free: not compared with it")
    return needed <= free


def print_report(console: Console, report: Report) -> None:
    """The worst of each output over ranks' steps, layer parts where there are any, and quality."""
    mark = {True: "[green]ok[/green]", False: "[red]FAIL[/red]"}
    table = Table("rank", "input", "outputs", "worst", "max error", "relative", "")
    for (rank, scenario), group in _grouped(report.outputs):
        worst = max(group, key=lambda each: (not each.passed, each.relative))
        passed = all(each.passed for each in group)
        table.add_row(
            str(rank),
            scenario,
            str(len(group)),
            worst.name,
            f"{max(each.max_abs for each in group):.2e}",
            f"{max(each.relative for each in group):.2e}",
            mark[passed],
        )
    console.print("[bold]Each rank's engine against its PyTorch module[/bold] (Polygraphy)")
    console.print(table)
    for each in report.outputs:
        if each.rerouted:
            console.print(
                f"rank {each.rank}, {each.scenario}: {each.rerouted} token(s) of {each.name} routed otherwise and left out:"
                f" two experts' router logits within {each.rerouted_margin:.1e} of the largest",
                highlight=False,
            )
    if report.parts:
        _print_parts(console, report, mark)
    if report.quality:
        _print_quality(console, report, mark)
    console.print("within tolerance" if report.passed else verdict(report), highlight=False)


def verdict(report: Report) -> str:
    """One line that says what is out of tolerance and where it enters."""
    failed = [part for part in report.parts if not part.passed]
    if not report.parts:
        return f"OUT OF TOLERANCE: {_beyond(report)}; this backend's engines are not run in parts"
    if not failed:
        return "OUT OF TOLERANCE: no part alone is; the error builds up over the layers"
    # the rank whose own share of the sum is wrong, not its peers that got the sum
    first = max((part for part in failed if part.module == failed[0].module), key=lambda part: part.own_relative)
    return (
        f"OUT OF TOLERANCE: the error enters in {first.module} on rank {first.rank} (relative {first.own_relative:.2e})"
    )


def _beyond(report: Report) -> str:
    """What is out of tolerance where no parts were run: outputs, of which the first in the graph's order, or the logits."""
    outputs = [each for each in report.outputs if not each.passed]
    if not outputs:
        return "no rank's outputs alone are; all ranks together are too far from Hugging Face's model"
    first = min(outputs, key=lambda each: _layer(each.name))
    return f"{len(outputs)} outputs, first {first.name} of rank {first.rank} (relative {first.relative:.2e})"


def _layer(output: str) -> int:
    """Of a cache's name; the others come last."""
    part = output.split(".")[1:2]
    return int(part[0]) if part and part[0].isdigit() else sys.maxsize


def _grouped(outputs: Any) -> list[tuple[tuple[int, str], list[Any]]]:
    groups: dict[tuple[int, str], list[Any]] = {}
    for each in outputs:
        groups.setdefault((each.rank, each.scenario), []).append(each)
    return sorted(groups.items(), key=lambda item: item[0][0])


def _print_parts(console: Console, report: Report, mark: dict[bool, str]) -> None:
    table = Table("module", "rank", "relative", "own share", "")
    for part in report.parts:
        table.add_row(
            part.module, str(part.rank), f"{part.relative:.2e}", f"{part.own_relative:.2e}", mark[part.passed]
        )
    console.print("[bold]Each part alone[/bold], fed with PyTorch's values")
    console.print(table)


def _print_quality(console: Console, report: Report, mark: dict[bool, str]) -> None:
    table = Table("input", "tokens", "max error", "KL", "top-1", "ppl", "HF's", "")
    for each in report.quality:
        likely = each.scenario != "random"  # what follows random tokens is random: its perplexity says nothing
        table.add_row(
            each.scenario,
            str(each.tokens),
            f"{each.max_abs:.2e}",
            f"{each.kl:.2e}",
            f"{each.top1:.2%}" + (f" ({each.ties} at a tie)" if each.ties else ""),
            f"{each.perplexity:.4f}" if likely else "",
            f"{each.hf_perplexity:.4f}" if likely else "",
            mark[each.passed],
        )
    console.print("[bold]All ranks together against Hugging Face's model[/bold] (float32)")
    console.print(table)
