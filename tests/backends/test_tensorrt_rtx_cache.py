"""Caches of codes build for RTX cards: the bodies of attention's ops, and the operators of a graph without them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from programs import GRID, MAX_SEQ_LEN, Programs, Subject

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.choose import find_backend
from moecompiler.config import ExportOptions
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.schemes import Format

pytestmark = pytest.mark.xdist_group("tensorrt-rtx")


@pytest.mark.parametrize(
    ("form", "context", "pipeline"),
    [(Format.INT8, False, "tensorrt-rtx"), (Format.E4M3, False, "ootb"), (Format.E4M3, True, "tensorrt-rtx")],
)
def test_builds(
    shipped: Subject, programs: Programs, tmp_path: Path, form: Format, context: bool, pipeline: str
) -> None:
    config = dataclasses.replace(shipped.config, num_hidden_layers=1)
    exported = programs.exported(config, GRID["one-rank"], 0, ExportOptions("float16", max_seq_len=MAX_SEQ_LEN))
    recipe = QuantizationRecipe((), cache=CacheQuantization(form, ((0.02, 0.01),), context))
    program, _ = run_passes(named_pipelines(recipe)[pipeline], exported)
    limits = EngineLimits(4, MAX_SEQ_LEN - 1, MAX_SEQ_LEN, config.vocab_size)
    settings = BuildSettings(limits, compute_capabilities=("8.9",))
    files = find_backend("tensorrt-rtx").build(program, shipped.reader, "rank0", tmp_path, settings, lambda done: None)
    assert files["rank0.plan"].stat().st_size > 500_000
