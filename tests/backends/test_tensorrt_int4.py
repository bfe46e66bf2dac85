"""INT4 that TensorRT would dequantize itself: int8 codes in its place, and the same numbers to the bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from moecompiler.backends.tensorrt_int4 import NOTE, widen_int4
from moecompiler.backends.tensorrt_program import mark_plugins
from moecompiler.errors import UserError
from moecompiler.graph import DOMAIN, ONNX_DTYPES, Program, check, weight_tensor
from moecompiler.materializing import Materializer
from moecompiler.ops import add_function
from moecompiler.packing import stored
from moecompiler.plugins.quantized.dequantize import dequantize_spec, form_of
from moecompiler.quantization.schemes import INT8, WeightScheme, int4
from moecompiler.tools.backend import tidy
from moecompiler.weights import Part, Quantized, Recipe, Shape, whole

ROWS, IN = 6, 64


class Reader:
    """One weight of large and small rows."""

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        numbers = np.random.default_rng(7).standard_normal((ROWS, IN)) * np.array([[0.01, 0.3, 1, 5, 40, 300]]).T
        return numbers.astype(np.float32)


def dequantized(scheme: WeightScheme, dtype: str) -> Program:
    """The body of ``DequantizeInt4``, … as prepared for TensorRT: inlined and tidied."""
    form = form_of(scheme)
    assert form is not None
    spec = dequantize_spec(form)
    source = whole("weight", dtype, (ROWS, IN))
    weights, shape = {}, scheme.scale_shape((ROWS, IN))
    for value in spec.inputs:
        part = Part(value.name.removeprefix("weight_"))
        kind = dtype if value.type == "T" else value.type
        weights[value.name] = Recipe(
            kind, (ROWS, IN) if part is Part.CODES else shape, quantized=Quantized(source, scheme, part)
        )
    attributes = {"block_size": scheme.block_size} if form.blocks else {}
    node = helper.make_node(spec.name, list(weights), ["y"], "layer/Dequantize", domain=DOMAIN, **attributes)
    y = helper.make_tensor_value_info("y", ONNX_DTYPES[dtype], [ROWS, IN])
    graph = helper.make_graph([node], "g", [], [y], [weight_tensor(*each) for each in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    add_function(model, spec)
    return tidy(Program(mark_plugins(model, {}), weights))


def evaluate(program: Program) -> np.ndarray:
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    tensors = Materializer(Reader())
    for tensor in model.graph.initializer:
        if recipe := program.weights.get(tensor.name):
            data = stored(recipe, tensors.tensor(recipe)).tobytes()
            tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, recipe.shape, data, raw=True))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


def ops(program: Program) -> list[str]:
    return [node.op_type for node in program.model.graph.node]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, IN, None])
def test_the_same_numbers(block_size: int | None, symmetric: bool, dtype: str) -> None:
    before = dequantized(int4(block_size, symmetric=symmetric), dtype)
    after, notes = widen_int4(before)
    check(after)
    kinds = {tensor.name: tensor.data_type for tensor in after.model.graph.initializer}
    assert (kinds["weight_codes"], after.weights["weight_codes"].dtype) == (TensorProto.INT8, "int8")
    assert TensorProto.INT4 not in kinds.values()
    assert notes == (NOTE,)
    assert "Expand" not in ops(after)
    assert not any(each.name == "block_size" for node in after.model.graph.node for each in node.attribute)
    found, wanted = evaluate(after), evaluate(before)
    assert found.dtype == wanted.dtype == np.dtype(dtype)
    assert np.ptp(wanted) > 100
    np.testing.assert_array_equal(found, wanted)


def test_the_program_given_stays_as_it_was() -> None:
    program = dequantized(int4(16), "float16")
    before = program.model.SerializeToString()
    widen_int4(program)
    assert program.model.SerializeToString() == before


def test_int8_is_left_alone() -> None:
    program = dequantized(INT8, "float16")
    assert widen_int4(program) == (program, ())


def test_what_a_plugin_reads_is_left_alone() -> None:
    program = dequantized(int4(16), "float16")
    (node,) = program.model.graph.node
    node.op_type = "DequantizeInt4Plugin"
    assert widen_int4(program) == (program, ())


@pytest.mark.parametrize("name", ["weight_codes", "weight_scales"])
def test_what_is_read_elsewhere_too_is_refused(name: str) -> None:
    program = dequantized(int4(16), "float16")
    program.model.graph.node.add(op_type="Identity", input=[name], output=["copied"])
    with pytest.raises(UserError, match="computes wrong numbers with INT4, and weight_codes cannot be int8 instead"):
        widen_int4(program)
