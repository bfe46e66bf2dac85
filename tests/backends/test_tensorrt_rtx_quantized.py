"""Quantized graphs build for RTX cards: each scheme, as plain operators and as bodies of quantized ops."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from fp8 import fp8_recipe
from programs import GRID, MAX_SEQ_LEN, Programs, Subject

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.choose import find_backend
from moecompiler.config import ExportOptions
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.quantization.recipe import default_recipe
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, WeightScheme, int4

pytestmark = pytest.mark.xdist_group("tensorrt-rtx")
NOTE = "--moe_weights external: quantized experts are baked into the engine, for they are read by no plugin"


@pytest.mark.parametrize(
    ("scheme", "pipeline", "dtype", "moe_weights"),
    [
        (INT8, "tensorrt-rtx", "float16", "external"),
        (INT8, "ootb", "float16", "auto"),
        (int4(64), "tensorrt-rtx", "float16", "auto"),
        (int4(64), "ootb", "bfloat16", "auto"),
        (int4(64, symmetric=False), "tensorrt-rtx", "float16", "external"),
        (int4(64, symmetric=False), "ootb", "bfloat16", "auto"),
        (FP8, "tensorrt-rtx", "float16", "external"),
        (FP8, "ootb", "bfloat16", "auto"),
        (NVFP4, "tensorrt-rtx", "float16", "external"),
        (NVFP4, "ootb", "bfloat16", "auto"),
    ],
)
def test_every_scheme_builds(
    shipped: Subject,
    programs: Programs,
    tmp_path: Path,
    scheme: WeightScheme,
    pipeline: str,
    dtype: str,
    moe_weights: str,
) -> None:
    """Codes are constants, even where experts are to be bound: TensorRT dequantizes no others. In float16 one layer will do; in
    bfloat16 all are exported already, for other tests."""
    layers = 1 if dtype == "float16" else 4
    config = dataclasses.replace(shipped.config, num_hidden_layers=layers)
    exported = programs.exported(config, GRID["one-rank"], 0, ExportOptions(dtype, max_seq_len=MAX_SEQ_LEN))
    recipe = fp8_recipe(shipped) if scheme == FP8 else default_recipe(scheme)
    program, _ = run_passes(named_pipelines(recipe)[pipeline], exported)
    limits = EngineLimits(4, MAX_SEQ_LEN - 1, MAX_SEQ_LEN, config.vocab_size)
    settings = BuildSettings(limits, moe_weights=moe_weights, compute_capabilities=("8.9",))
    files = find_backend("tensorrt-rtx").build(program, shipped.reader, "rank0", tmp_path, settings, lambda done: None)
    record = json.loads(files["rank0.engine.json"].read_text())
    assert record["bound"] == []
    assert record["notes"] == ([NOTE] if moe_weights == "external" else [])
    assert files["rank0.plan"].stat().st_size > 500_000  # embedding and head, 800 kB
