"""FP8 experts that TensorRT would dequantize itself: the float weights they stand for, to the bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from moecompiler.backends.tensorrt_fp8 import NOTE, widen_fp8_experts
from moecompiler.graph import ONNX_DTYPES, Program, check, weight_tensor
from moecompiler.materializing import Materializer
from moecompiler.packing import stored
from moecompiler.quantization.schemes import FP8
from moecompiler.weights import Part, Quantized, Recipe, Shape, joined, whole

EXPERTS, ROWS, IN = 3, 4, 16


class Reader:
    """Experts of scales that are far apart."""

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        rng = np.random.default_rng(int(name))
        return (rng.standard_normal(shape) * 10.0 ** int(name)).astype(np.float32)


def dequantized(dtype: str, experts: bool) -> Program:
    boxes = [whole(str(each), dtype, (1, ROWS, IN) if experts else (ROWS, IN)) for each in range(EXPERTS)]
    source, rows = joined(boxes, 0), EXPERTS * ROWS
    weights = {
        "codes": Recipe("float8_e4m3fn", (rows, IN), quantized=Quantized(source, FP8, Part.CODES)),
        "scales": Recipe(dtype, (rows,), quantized=Quantized(source, FP8, Part.SCALES)),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], "mlp/Dequantize", axis=0),
        helper.make_node("Identity", ["weight"], ["y"], "mlp/Identity"),
    ]
    y = helper.make_tensor_value_info("y", ONNX_DTYPES[dtype], [rows, IN])
    graph = helper.make_graph(nodes, "g", [], [y], [weight_tensor(*each) for each in weights.items()])
    return Program(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), weights)


def evaluate(program: Program) -> np.ndarray:
    model, tensors = onnx.ModelProto(), Materializer(Reader())
    model.CopyFrom(program.model)
    for tensor in model.graph.initializer:
        recipe = program.weights[tensor.name]
        data = stored(recipe, tensors.tensor(recipe)).tobytes()
        tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, recipe.shape, data, raw=True))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_numbers(dtype: str) -> None:
    before = dequantized(dtype, experts=True)
    after, notes = widen_fp8_experts(before)
    check(after)
    assert notes == (NOTE,)
    assert set(after.weights) == {tensor.name for tensor in after.model.graph.initializer} == {"weight"}
    assert [node.op_type for node in before.model.graph.node] == ["DequantizeLinear", "Identity"]
    assert [node.op_type for node in after.model.graph.node] == ["Identity"]
    found, wanted = evaluate(after), evaluate(before)
    assert len(np.unique(np.abs(wanted).max(axis=1).round(1))) >= EXPERTS
    np.testing.assert_array_equal(found, wanted)


def test_other_codes_are_left_alone() -> None:
    """Of one matrix; and of what a plugin reads."""
    matrix, plugin = dequantized("float16", experts=False), dequantized("float16", experts=True)
    plugin.model.graph.node[0].op_type = "MoEFp8Plugin"
    for program in (matrix, plugin):
        assert widen_fp8_experts(program) == (program, ())
