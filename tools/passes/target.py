"""What the verbs of ``moecompiler passes`` look into: an output directory, by its export, or somebody else's ONNX file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moecompiler.artifact import Artifact
from moecompiler.errors import UserError
from moecompiler.tools.flags import SelectionFlags
from moecompiler.tools.job import Job
from moecompiler.tools.kv_cache import with_cache
from moecompiler.tools.quantization import checked_recipe, recipe_from_flags

if TYPE_CHECKING:
    from moecompiler.backends.base import EngineLimits
    from moecompiler.debugging.subject import Subject
    from moecompiler.validation.scenario import Scenario

Target = Annotated[
    Path, typer.Argument(help="What `export` or `compile` wrote, or an ONNX file.", metavar="DIR|FILE.onnx")
]
_TOKENS = 256  # of real text, beside random tokens: enough to reach every expert


def open_subject(target: Path, seed: int = 0) -> Subject:
    """The programs before any pass, and inputs to run them on.

    Raises: UserError where the target is neither, or ranks of it are missing.
    """
    if target.suffix == ".onnx":
        from moecompiler.debugging.foreign_subject import ForeignFile

        return ForeignFile(target, seed)
    from moecompiler.debugging.subject import ExportedRanks
    from moecompiler.dummy import open_source
    from moecompiler.validation.place import RankPlace

    artifact = open_export(target)
    artifact.check()
    job = Job.of(artifact)
    places = tuple(RankPlace(job.model, job.mapping, job.export, rank) for rank in range(artifact.world_size))
    source = open_source(job.source, job.model)
    scenarios, limits = _scenarios(job, seed)
    return ExportedRanks(artifact.directory, places, job.source, source, scenarios, limits)


def for_target(passes: SelectionFlags, target: Path) -> SelectionFlags:
    """With what is to be quantized: as the options say, or without any, as those did that the target was made with.

    Raises: UserError where the target's model cannot be quantized so.
    """
    if target.suffix == ".onnx":
        return replace(passes, recipe=recipe_from_flags(passes))
    job = Job.of(open_export(target))
    recipe = checked_recipe(passes, job.model, job.mapping, job.source) or job.quantization
    return replace(passes, recipe=with_cache(recipe, passes, job.model, job.source))


def open_export(target: Path) -> Artifact:
    """The export that ``target`` is, or that a compile left in it. Raises: UserError where there is none."""
    artifact = Artifact.open(target)
    if artifact.stage == "export":
        return artifact
    if not (target / "export").is_dir():
        raise UserError(f"{target}: holds no export, which passes are run on: give what `moecompiler compile` wrote")
    return Artifact.open(target / "export", ("export",))


def _scenarios(job: Job, seed: int) -> tuple[tuple[Scenario, ...], EngineLimits]:
    """Random tokens, and real text where the checkpoint has a tokenizer."""
    from moecompiler.backends.base import EngineLimits
    from moecompiler.runtime.prompts import load_tokenizer
    from moecompiler.tools.text import default_text
    from moecompiler.validation.scenario import random_scenario, text_scenario

    slots = job.export.max_seq_len
    limits = EngineLimits(4, slots - 1, slots, job.model.vocab_size)
    scenarios = [random_scenario(limits, seed)]
    folder = Path(job.source["model_dir"]) if job.source["kind"] == "hf" else None
    if folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = load_tokenizer(folder, job.model.vocab_size)
        ids = tokenizer.encode(default_text(job).read_text(encoding="utf-8")[: 20 * _TOKENS])
        if real := text_scenario(ids, limits, _TOKENS):
            scenarios.append(real)
    return tuple(scenarios), limits
