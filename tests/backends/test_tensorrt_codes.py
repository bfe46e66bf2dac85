"""Codes on their way to plugins of backend ``tensorrt``: int8 bytes, in the file that the parser reads and in engine inputs."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
from onnx import TensorProto
from programs import GRID, MAX_SEQ_LEN, Programs, Subject

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.tensorrt_program import Prepared, prepare, serialized
from moecompiler.config import ExportOptions
from moecompiler.errors import UserError
from moecompiler.graph import Program
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.plugin_switches import parse_plugins
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.quantization.recipe import default_recipe
from moecompiler.quantization.schemes import INT8, NVFP4, WeightScheme, int4

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def exported(shipped: Subject, programs: Programs) -> Program:
    config = dataclasses.replace(shipped.config, num_hidden_layers=1)
    return programs.exported(config, GRID["one-rank"], 0, ExportOptions("float16", max_seq_len=MAX_SEQ_LEN))


def prepared(
    exported: Program, scheme: WeightScheme, moe_weights: str = "external", plugins: str = "auto", batch: int = 4
) -> Prepared:
    program, _ = run_passes(named_pipelines(default_recipe(scheme))["plugins"], exported)
    limits = EngineLimits(
        batch, MAX_SEQ_LEN - 1, MAX_SEQ_LEN, program.model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    )
    settings = BuildSettings(limits, parse_plugins(plugins), moe_weights)
    return prepare(program, settings, "float16", 90, TensorRTPlugins())


@pytest.mark.parametrize("scheme", [INT8, int4(64), int4(64, symmetric=False), NVFP4], ids=str)
def test_every_quantized_op_is_a_plugin(exported: Program, scheme: WeightScheme) -> None:
    """Its codes are int8, two of 4 bits in one; recipes stay what they are, and bytes with them."""
    result = prepared(exported, scheme)
    ops = {node.op_type for node in result.program.model.graph.node}
    assert not ops & {"DequantizeLinear", "QuantizeLinear"}
    assert sum(op.startswith(("MoE", "Linear")) and op.endswith("Plugin") for op in ops) == 2
    inputs = {value.name: value.type.tensor_type for value in result.program.model.graph.input}
    codes = inputs[f"{EXPERTS}.codes"]
    recipe = result.bound[f"{EXPERTS}.codes"]
    assert codes.elem_type == TensorProto.INT8
    rows, columns = (dim.dim_value for dim in codes.shape.dim)
    assert recipe.nbytes == rows * columns
    assert {f"{EXPERTS}.{part}" for part in ("codes", "scales")} <= set(result.bound)
    file = onnx.load_from_string(serialized(result, "baked"))
    baked = [tensor for tensor in file.graph.initializer if tensor.name.endswith("codes")]
    assert len(baked) == 2  # of attention
    for tensor in baked:
        (length,) = (int(each.value) for each in tensor.external_data if each.key == "length")
        assert tensor.data_type == TensorProto.INT8
        assert length == tensor.dims[0] * tensor.dims[1]


def test_codes_that_an_operator_reads_are_numbers(exported: Program) -> None:
    result = prepared(exported, int4(64), "engine", "moe=off")
    types = {tensor.name: tensor.data_type for tensor in result.program.model.graph.initializer}
    assert types[f"{EXPERTS}.codes"] == TensorProto.INT8
    attention = [kind for name, kind in types.items() if name.endswith("codes") and "experts" not in name]
    assert attention == [TensorProto.INT8] * 2
    assert result.bound == {}


def test_slower_steps_are_noted(exported: Program) -> None:
    """Of a plugin, where the engine takes as many tokens."""
    of_few, of_many = prepared(exported, int4(64)), prepared(exported, int4(64), batch=64)
    without = prepared(exported, int4(64), plugins="off", batch=64)
    told = [[note.partition(":")[0] for note in each.notes if "slower" in note] for each in (of_few, of_many, without)]
    assert told == [["LinearInt4"], ["LinearInt4", "MoEInt4"], []]


def test_codes_of_a_plugin_and_of_an_operator(exported: Program) -> None:
    """One tensor cannot be both."""
    program, _ = run_passes(named_pipelines(default_recipe(int4(64)))["plugins"], exported)
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    node = next(node for node in model.graph.node if node.op_type == "LinearInt4")
    model.graph.node.add(op_type="Identity", name="copy", input=[node.input[1]], output=["copied"])
    limits = EngineLimits(4, MAX_SEQ_LEN - 1, MAX_SEQ_LEN, 8)
    settings = BuildSettings(limits, parse_plugins("auto"), "engine")
    with pytest.raises(UserError, match=r"copy reads .*, which a plugin reads too: with --plugins"):
        prepare(Program(model, program.weights), settings, "float16", 90, TensorRTPlugins())
