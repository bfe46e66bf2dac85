"""Engines of ONNX Runtime whose plugins Triton's interpreter runs compute what the ops' bodies do, in every format."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from programs import GRID, MAX_SEQ_LEN, Passage, Programs, Subject, run_ranks

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeSession, open_part, open_session
from moecompiler.backends.onnxruntime_interpreted import interpret_plugins
from moecompiler.backends.onnxruntime_lowering import lower
from moecompiler.backends.onnxruntime_operators import plugin_nodes
from moecompiler.backends.onnxruntime_routing import load_counting
from moecompiler.calibration.static import with_input_scales
from moecompiler.config import ExportOptions
from moecompiler.errors import UserError
from moecompiler.graph import Program
from moecompiler.ops import add_function
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.plugin_switches import parse_plugins
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.plugins.rmsnorm.op import ALL_REDUCE_ADD_RMS_NORM
from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.recipe import QuantizationRecipe, default_recipe
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, Format, int4
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.threads import run_in_threads

ALONE = GRID["one-rank"]
LIMITS = EngineLimits(3, MAX_SEQ_LEN, MAX_SEQ_LEN, 1536)
NORMS = {"RMSNorm": 2, "AddRMSNorm": 1}


@cache
def plugins() -> TensorRTPlugins:
    return TensorRTPlugins()


@pytest.fixture(scope="module")
def short(passage: Passage) -> Passage:
    """One sequence: a prefill, and a step of one token."""
    return Passage(passage.tokens[:1], (5,), 1)


@pytest.fixture(scope="module")
def layer(shipped: Subject) -> Subject:
    """The trained model's first layer."""
    return dataclasses.replace(shipped, config=dataclasses.replace(shipped.config, num_hidden_layers=1))


def recipe_of(form: str, layer: Subject) -> QuantizationRecipe | None:
    cached = {"cache-int8": (Format.INT8, False), "cache-fp8": (Format.E4M3, False), "context-fp8": (Format.E4M3, True)}
    if form in cached:
        kind, context = cached[form]
        return QuantizationRecipe((), cache=CacheQuantization(kind, ((12 / 127, 4 / 127),), context))
    recipes: dict[str, QuantizationRecipe | None] = {
        "none": None,
        "int8": default_recipe(INT8),
        "int4": default_recipe(int4(32)),
        "int4-asymmetric": default_recipe(int4(64, symmetric=False)),
        "nvfp4": default_recipe(NVFP4),
        "fp8": with_input_scales(default_recipe(FP8), layer.config, lambda name: 0.02),
    }
    return recipes[form]


def fused(
    programs: Programs, layer: Subject, dtype: str = "float16", form: str = "none", pipeline: str = "plugins"
) -> Program:
    exported = programs.exported(layer.config, ALONE, 0, ExportOptions(dtype, max_seq_len=MAX_SEQ_LEN))
    return run_passes(named_pipelines(recipe_of(form, layer))[pipeline], exported)[0]


def build(program: Program, layer: Subject, directory: Path, switches: str, *tactics: str) -> OnnxRuntimeSession:
    directory.mkdir(exist_ok=True)
    backend = OnnxRuntimeBackend(plugins())
    settings = BuildSettings(LIMITS, parse_plugins(switches), plugin_tactics=tactics)
    for name, path in backend.build(program, layer.reader, "rank0", directory, settings, lambda fraction: None).items():
        os.replace(path, directory / name)
    return backend.load(directory, "rank0", LIMITS, threads=1)


def record(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "rank0.engine.json").read_text())
    return content


def counted(directory: Path) -> dict[str, int]:
    found = list(record(directory)["plugins"].values())
    return {op: found.count(op) for op in found}


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


# Measured: 4e-4; 5e-3 in bfloat16, against bodies in float32; where inputs or keys are rounded to 8 bits, some go the other way
@pytest.mark.parametrize(
    ("dtype", "form", "made", "bound"),
    [
        ("float16", "none", {"Attention": 1, "MoE": 1}, 1e-3),
        ("bfloat16", "none", {"Attention": 1, "MoE": 1}, 1e-2),
        ("float16", "fp8", {"Attention": 1, "MoEFp8": 1, "LinearFp8": 2}, 1e-2),
        ("bfloat16", "int4-asymmetric", {"Attention": 1, "MoEInt4Asymmetric": 1, "LinearInt4Asymmetric": 2}, 1e-2),
        ("float16", "context-fp8", {"AttentionFp8Context": 1, "MoE": 1}, 1e-2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("float16", "int8", {"Attention": 1, "MoEInt8": 1, "LinearInt8": 2}, 1e-3),
                ("float16", "int4", {"Attention": 1, "MoEInt4": 1, "LinearInt4": 2}, 1e-3),
                ("float16", "nvfp4", {"Attention": 1, "MoENvfp4": 1, "LinearNvfp4": 2}, 1e-3),
                ("bfloat16", "nvfp4", {"Attention": 1, "MoENvfp4": 1, "LinearNvfp4": 2}, 1e-2),
                ("bfloat16", "fp8", {"Attention": 1, "MoEFp8": 1, "LinearFp8": 2}, 2e-2),
                ("float16", "cache-int8", {"AttentionInt8Cache": 1, "MoE": 1}, 1e-2),
                ("bfloat16", "cache-fp8", {"AttentionFp8Cache": 1, "MoE": 1}, 2e-2),
                ("float16", "cache-fp8", {"AttentionFp8Cache": 1, "MoE": 1}, 1e-2),
            )
        ),
    ],
)
def test_every_op(
    programs: Programs,
    layer: Subject,
    short: Passage,
    tmp_path: Path,
    dtype: str,
    form: str,
    made: dict[str, int],
    bound: float,
) -> None:
    program = fused(programs, layer, dtype, form)
    before = program.model.SerializeToString(deterministic=True)
    on, off = (build(program, layer, tmp_path / switches, switches) for switches in ("on", "off"))
    assert program.model.SerializeToString(deterministic=True) == before
    assert counted(tmp_path / "on") == NORMS | made
    assert not (tmp_path / "off" / "rank0.engine.json").exists()
    held = onnx.load(tmp_path / "on" / "rank0.onnx", load_external_data=False)
    assert not any("experts" in tensor.name and len(tensor.dims) > 1 for tensor in held.graph.initializer)
    got, wanted = (run_ranks([each], ALONE, short) for each in (on, off))
    error = relative_error(got, wanted)
    assert 0 < error < bound  # other kernels, so not the same bits


def test_switches_and_tactics(
    programs: Programs, layer: Subject, passage: Passage, short: Passage, tmp_path: Path
) -> None:
    """By op and by node, plans by name; the others are bodies. A ragged batch; a session that counts tokens too."""
    program = fused(programs, layer)
    on = build(program, layer, tmp_path / "on", "rmsnorm=on,moe=on,@layers.0.input_layernorm=off", "tails")
    assert counted(tmp_path / "on") == {"RMSNorm": 1, "AddRMSNorm": 1, "MoE": 1}
    assert set(record(tmp_path / "on")["tactics"].values()) == {"rows", "tails"}
    assert record(tmp_path / "on")["notes"] == []
    ragged = Passage(passage.tokens[:2], (4, 2), 1)
    off = build(program, layer, tmp_path / "off", "auto")
    assert 0 < relative_error(run_ranks([on], ALONE, ragged), run_ranks([off], ALONE, ragged)) < 1e-3

    counts = []
    for name in ("on", "off"):
        session = load_counting(tmp_path / name, "rank0", LIMITS, 1, 2, plugins().interpret)
        run_ranks([session], ALONE, short)
        counts.append(session.counts[0])
    np.testing.assert_array_equal(*counts)
    assert counts[0].sum() == 2 * 6

    build(program, layer, tmp_path / "astray", "moe=on,moe@layers.7=on")
    assert record(tmp_path / "astray")["notes"] == ["--plugins moe@layers.7=on fits no node of the graph"]


def test_refusals(programs: Programs, layer: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, wide = fused(programs, layer), fused(programs, layer, "bfloat16", pipeline="ootb")
    with pytest.raises(
        UserError, match="--plugin_tactics grouped: no plugin of the graph has it; there are mixed, whole"
    ):
        build(program, layer, tmp_path, "moe=on", "grouped")
    with pytest.raises(UserError, match="the graph has no fused ops; compile with --pipeline plugins"):
        build(wide, layer, tmp_path, "on")
    settings = BuildSettings(LIMITS, parse_plugins("moe=on"))
    (note,) = OnnxRuntimeBackend(plugins()).notes("float16", settings)
    assert "Triton's interpreter" in note
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton is not installed: pip install triton"):
        OnnxRuntimeBackend(plugins()).notes("float16", settings)


def test_what_has_no_kernels(programs: Programs, layer: Subject, tmp_path: Path) -> None:
    """Attention in float32 runs as a body, unless it is insisted on."""
    program = fused(programs, layer, "float32")
    with pytest.raises(
        UserError, match=r"--plugins on: model.layers.0.*Attention.* cannot be a plugin: its plugin has no"
    ):
        build(program, layer, tmp_path, "on")
    build(program, layer, tmp_path, "rmsnorm=on")
    assert counted(tmp_path) == NORMS


def test_what_fails_in_a_kernel(programs: Programs, layer: Subject, short: Passage, tmp_path: Path) -> None:
    """One line that names the node, not the end of the process; the next run is as if nothing had been."""
    session = build(fused(programs, layer), layer, tmp_path, "moe=on")
    wanted = run_ranks([session], ALONE, short)
    path = tmp_path / "rank0.onnx"
    model = onnx.load(path, load_external_data=False)
    (node,) = plugin_nodes(model)
    (text,) = (attribute for attribute in node.attribute if attribute.name == "node")
    text.s = text.s.replace(b'"mixed"', b'"other"')
    onnx.save(model, path)
    broken = OnnxRuntimeSession(open_session(path, 1, plugins().interpret), LIMITS)
    with pytest.raises(UserError, match=r"model.layers.0.mlp.*MoE.*\(tactic other\): build it anew"):
        run_ranks([broken], ALONE, short)
    np.testing.assert_array_equal(run_ranks([session], ALONE, short), wanted)


def test_ranks_that_add_up_before_a_norm() -> None:
    """An op in whose body ranks exchange something: they do, and the norm is interpreted."""
    text = """
        <ir_version: 10, opset_import: ["": 21, "moecompiler": 1]>
        g (float[2, 16] r, float[2, 16] b) => (float[2, 16] y, float[2, 16] x)
        <float[16] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[2, 16] y, float[2, 16] x>
        { ["m/Norm"] y, x = moecompiler.AllReduceAddRMSNorm<epsilon: float = 0.01, group: ints = [0, 1]>(r, b, w) }
    """
    model = onnx.parser.parse_model(text)
    add_function(model, ALL_REDUCE_ADD_RMS_NORM)
    made = interpret_plugins(Program(model), parse_plugins("on"), "float32", plugins(), "")
    assert made.plugins == {"m/Norm": "AllReduceAddRMSNorm"}
    r, b = np.random.default_rng(0).standard_normal((2, 2, 16)).astype(np.float32)

    def run(communicator: Communicator) -> list[list[np.ndarray]]:
        feeds = {"r": r, "b": (1 + communicator.rank) * b}
        lowered = (lower(each).model for each in (made.program, Program(model)))
        return [open_part(each, Path(), 1, plugins().interpret).run(None, feeds) for each in lowered]

    for got, wanted in run_in_threads(2, run):
        for mine, theirs in zip(got, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5)
        np.testing.assert_allclose(got[1], r + 3 * b, rtol=1e-5)
