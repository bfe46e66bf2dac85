"""One comparison, from its sides to its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from polygraphy.logger import G_LOGGER

from moecompiler.checkpoint import expected_tensors
from moecompiler.comparison.reference import ReferenceModel
from moecompiler.comparison.result import Result
from moecompiler.comparison.thresholds import bounds_for
from moecompiler.comparison.verdict import verdict
from moecompiler.dummy import open_source
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantized import formats_of
from moecompiler.tools.bench_quantized_engines import format_of
from moecompiler.tools.comparison.about import describe
from moecompiler.tools.comparison.measure import (
    Measuring,
    is_interpreted,
    measure_layer_level,
    measure_model_level,
    measure_op_level,
    measure_routing_level,
    smallest,
)
from moecompiler.tools.comparison.request import Request, read_text, scenario_of
from moecompiler.tools.comparison.sides import Side
from moecompiler.tools.job import Job
from moecompiler.tools.validate import quantization_of


def measure(measuring: Measuring) -> Result:
    """The levels that are asked for. Raises: UserError where one cannot be measured."""
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # what Polygraphy would print is no part of the output
    sides, request = measuring.sides, measuring.request
    op = measure_op_level(measuring, measuring.told) if "op" in request.levels else None
    layer = measure_layer_level(measuring) if "layer" in request.levels else None
    model = measure_model_level(measuring) if "model" in request.levels else None
    routing = measure_routing_level(measuring) if "routing" in request.levels else None
    runs = measuring.engine_runs() if {"layer", "model"} & {*request.levels} else {}
    interpreted = frozenset(side.name for side in sides if is_interpreted(side))
    if interpreted:
        measuring.notes.append(
            f"{', '.join(sorted(interpreted))}: kernels are run by Triton's interpreter, whose time says nothing: not shown"
        )
    held = held_by(measuring.reference_model)
    meta = describe(sides, measuring.scenario, measuring.text, request, runs, held, interpreted)
    checks = verdict(measuring.bounds, op, layer, model, routing)
    if not checks:
        measuring.notes.append(
            "of so few tokens of quantized weights nothing is bounded: there is no verdict (--tokens)"
        )
    return Result(meta, op, layer, model, routing, checks, tuple(measuring.notes))


def prepare(sides: tuple[Side, Side], request: Request, told: Callable[[str], None]) -> Measuring:
    """Raises: UserError where the checkpoint has changed, or PyTorch's float32 model does not fit into memory."""
    first, notes = sides[0], list[str]()
    job, limits = first.job, smallest(sides)
    text = read_text(
        first.engines if first.engines.directory.joinpath("tokenizer").is_dir() else sides[1].engines, request, notes
    )
    scenario = scenario_of(text, limits, request.tokens, request.seed)
    model, own_weights = reference_of(sides, notes)
    if {*request.levels} - {"op"}:
        _check_fits(job)
    formats = formats_of(job.quantization) | formats_of(sides[1].job.quantization)
    cache = any(side.job.quantization is not None and side.job.quantization.cache is not None for side in sides)
    widest = max((side.job.export.dtype for side in sides), key=("float32", "float16", "bfloat16").index)
    tokens = len(scenario.prompt_lengths) * (scenario.decode_steps + 1)
    bounds = bounds_for(widest, formats, cache=cache, tokens=tokens, against_floats=own_weights)
    reader = open_source(job.source, job.model)
    return Measuring(sides, model, reader, scenario, text, bounds, request, told, notes)


def reference_of(sides: tuple[Side, Side], notes: list[str]) -> tuple[ReferenceModel, bool]:
    """What PyTorch computes with: the sides' own weights, as they are rounded or quantized, where both have the same; else the
    checkpoint's, which is said, and True."""
    first, second = (side.job for side in sides)
    limits, ranks = smallest(sides), range(first.mapping.world_size)
    same = (first.quantization, first.export.dtype, first.mapping) == (
        second.quantization,
        second.export.dtype,
        second.mapping,
    )
    if same:
        recipes = tuple(quantization_of(sides[0].engines, rank) for rank in ranks)
        return ReferenceModel(first.model, first.mapping, first.export, recipes, limits), False
    notes.append(
        "the two are of different types, quantizations or mappings: the reference holds the checkpoint's own weights"
    )
    options = replace(first.export, dtype="float32")
    none: tuple[QuantizationRecipe | None, ...] = (None,)
    return ReferenceModel(first.model, Mapping.create(), options, none, limits), True


def held_by(model: ReferenceModel) -> str:
    """Which weights, as the report says."""
    recipe = model.quantization[0]
    if recipe is not None:
        return f"the numbers that {format_of(recipe)} stands for"
    return "the checkpoint's own" if model.options.dtype == "float32" else f"rounded to {model.options.dtype}"


def _check_fits(job: Job) -> None:
    """Raises: UserError where the float32 model does not fit into the memory that is free."""
    import os

    needed = 4 * sum(int(np.prod(shape)) for shape in expected_tensors(job.model).values())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise UserError(
            f"PyTorch's float32 model takes {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free: give --level op, which has"
            " one node in memory at a time"
        )
