"""Caches of codes that plain operators read: unsigned bytes for backend ``tensorrt``, and the same numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_session import Setting
from onnx import TensorProto
from programs import GRID, MAX_SEQ_LEN, Programs, Subject

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.choose import find_backend
from moecompiler.backends.onnxruntime import open_session
from moecompiler.backends.tensorrt_bytes import unsigned_caches
from moecompiler.backends.tensorrt_program import Prepared, prepare
from moecompiler.calibration.static import with_input_scales
from moecompiler.config import ExportOptions
from moecompiler.graph import Program
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.plugin_switches import parse_plugins
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.recipe import QuantizationRecipe, default_recipe
from moecompiler.quantization.schemes import FP8, Format
from moecompiler.tools.backend import tidy

CACHES = {f"{place}.0.{kind}" for place in ("past_key_values", "present") for kind in ("key", "value")}
SETTINGS = BuildSettings(EngineLimits(5, MAX_SEQ_LEN, MAX_SEQ_LEN, 1536), parse_plugins("off"))


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Of every tensor."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return types | {
        value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)
    }


@pytest.mark.parametrize("read", ["CastLike (codes, like)", "Cast<to = 10>(codes)"])
def test_every_byte_is_the_number_that_it_was(read: str) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        one (int8[256] codes, float16[1] like) => (float16[256] numbers, int8[256] present, int8[256] others) {{
            numbers = {read}
            present = Cast<to = 3>(numbers)
            others = Identity(present)
        }}"""
    )
    assert unsigned_caches(model) == ["codes", "present"]
    model.graph.output.pop()  # an int8 that nothing casts stays what it is
    del model.graph.node[-1]
    onnx.checker.check_model(model, full_check=True)
    codes, like = np.arange(256, dtype=np.uint8), np.ones(1, np.float16)
    run = onnxruntime.InferenceSession(model.SerializeToString()).run
    numbers, present = run(None, {"codes": codes, "like": like})
    np.testing.assert_array_equal(numbers, codes.view(np.int8).astype(np.float16))
    np.testing.assert_array_equal(present, codes)
    assert present.dtype == np.uint8


@pytest.mark.parametrize("reader", ["past, x", "x, past"])
def test_what_others_read_stays(reader: str) -> None:
    """A plugin; or an operator that looks at the type."""
    op = "AttentionPlugin" if reader == "past, x" else "CastLike"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21, "other": 1]>
        one (int8[2] past, float16[2] x) => (int8[2] y) {{ y = {"other." if op != "CastLike" else ""}{op}({reader}) }}"""
    )
    before = model.SerializeToString()
    assert unsigned_caches(model) == []
    assert model.SerializeToString() == before


@pytest.fixture
def exported(shipped: Subject, programs: Programs) -> Program:
    config = dataclasses.replace(shipped.config, num_hidden_layers=1)
    return programs.exported(config, GRID["one-rank"], 0, ExportOptions("float16", max_seq_len=MAX_SEQ_LEN))


def prepared(
    program: Program, shipped: Subject, recipe: QuantizationRecipe, pipeline: str, plugins: str
) -> tuple[Program, Prepared]:
    config = dataclasses.replace(shipped.config, num_hidden_layers=1)
    recipe = with_input_scales(recipe, config, lambda name: 0.05)
    made, _ = run_passes(named_pipelines(recipe)[pipeline], program)
    settings = dataclasses.replace(SETTINGS, plugins=parse_plugins(plugins))
    return made, prepare(made, settings, "float16", 90, TensorRTPlugins(), tidy)


@pytest.mark.parametrize("pipeline", ["ootb", "plugins"])
@pytest.mark.parametrize("form", [Format.INT8, Format.E4M3], ids=str)
def test_no_int8_beside_fp8_weights(exported: Program, shipped: Subject, form: Format, pipeline: str) -> None:
    """Which TensorRT 10.6 refuses."""
    cache = CacheQuantization(form, ((0.02, 0.01),), form is Format.E4M3 and pipeline == "plugins")
    recipe = dataclasses.replace(default_recipe(FP8), cache=cache)
    model = prepared(exported, shipped, recipe, pipeline, "off")[1].program.model
    types = types_of(model)
    assert {name for name, kind in types.items() if kind == TensorProto.UINT8} == CACHES
    assert TensorProto.FLOAT8E4M3FN in types.values()
    assert TensorProto.INT8 not in types.values()


@pytest.mark.parametrize(("plugins", "kind"), [("auto", TensorProto.INT8), ("attention=off", TensorProto.UINT8)])
def test_caches_of_plugins_are_int8(exported: Program, shipped: Subject, plugins: str, kind: int) -> None:
    recipe = QuantizationRecipe((), cache=CacheQuantization(Format.E4M3, ((0.02, 0.01),)))
    _, result = prepared(exported, shipped, recipe, "plugins", plugins)
    graph = result.program.model.graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert {found[name] for name in CACHES} == {kind}
    assert bool(result.aliases) == (kind == TensorProto.INT8)


def engine(program: Program, shipped: Subject, directory: Path) -> Path:
    """ONNX Runtime's, with the name of a plan's."""
    directory.mkdir()
    files = find_backend("onnxruntime").build(program, shipped.reader, "rank0", directory, SETTINGS, lambda done: None)
    for name, path in files.items():
        path.rename(directory / name)
    (directory / "rank0.plan").write_text(str(directory / "rank0.onnx"))
    return directory


@pytest.mark.parametrize("form", [Format.INT8, Format.E4M3], ids=str)
def test_a_session_of_such_an_engine(
    exported: Program, shipped: Subject, form: Format, setting: Setting, tmp_path: Path
) -> None:
    """Two steps, and what is in the caches then: bit for bit what the graph of int8 caches has."""
    recipe = QuantizationRecipe((), cache=CacheQuantization(form, ((0.02, 0.01),)))
    program, result = prepared(exported, shipped, recipe, "ootb", "off")
    session = open_session(engine(program, shipped, tmp_path / "int8") / "rank0.onnx", 1)
    outputs = [value.name for value in session.get_outputs()]
    setting.directory = engine(result.program, shipped, tmp_path / "uint8")
    ours = setting.session()
    ids, positions = np.arange(8).reshape(2, 4) + 5, np.tile(np.arange(4), (2, 1))

    def feeds(at: slice, caches: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        last = np.full(2, ids[:, at].shape[1] - 1)
        return {"input_ids": ids[:, at], "position_ids": positions[:, at], "last_token_ids": last} | dict(caches)

    names = [name for name in CACHES if name.startswith("past")]
    shape = (2, shipped.config.num_key_value_heads, MAX_SEQ_LEN, shipped.config.head_dim)
    codes = np.random.default_rng(0).integers(-126, 126, math.prod(shape), np.int8).reshape(shape)
    caches = [dict.fromkeys(names, codes) for _ in range(2)]
    for at in (slice(0, 3), slice(3, 4)):
        expected = dict(zip(outputs, session.run(outputs, feeds(at, caches[0])), strict=True))
        got = ours.call(feeds(at, caches[1]))
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        caches = [
            {name: each[name.replace("past_key_values", "present")] for name in names} for each in (expected, got)
        ]


@pytest.mark.xdist_group("tensorrt-rtx")
def test_builds_for_rtx_cards(exported: Program, shipped: Subject, tmp_path: Path) -> None:
    """The spelling itself: TensorRT-RTX has the parser and types that TensorRT has. With FP8 weights and FP8 attention."""
    recipe = dataclasses.replace(default_recipe(FP8), cache=CacheQuantization(Format.E4M3, ((0.02, 0.01),), True))
    program = prepared(exported, shipped, recipe, "plugins", "off")[1].program
    settings = dataclasses.replace(SETTINGS, compute_capabilities=("8.9",))
    backend = find_backend("tensorrt-rtx")
    files = backend.build(program, shipped.reader, "rank0", tmp_path, settings, lambda done: None)
    graph = onnx.load(files["rank0.onnx"], load_external_data=False).graph
    assert {value.type.tensor_type.elem_type for value in graph.input if value.name in CACHES} == {TensorProto.UINT8}
    assert files["rank0.plan"].stat().st_size > 500_000
