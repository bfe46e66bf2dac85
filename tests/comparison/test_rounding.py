"""Bodies in a narrow type on ONNX Runtime: rounded after each operator, as numpy rounds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from readers import ArrayReader

from moecompiler.comparison.runners import BodiesOnOnnxRuntime, infer
from moecompiler.graph import DOMAIN, IR_VERSION, OPSET, Program

TYPES = {"float16": (np.float16, TensorProto.FLOAT16), "bfloat16": (ml_dtypes.bfloat16, TensorProto.BFLOAT16)}


def program(kind: int, dtype: type) -> Program:
    """``(a * b + 1/3) * b``, the sum in a function."""
    third = numpy_helper.from_array(np.array(1 / 3, dtype), "third")
    nodes = [
        helper.make_node("Mul", ["a", "b"], ["c"], "m/Mul"),
        helper.make_node("AddThird", ["c"], ["d"], "m/AddThird", domain=DOMAIN),
        helper.make_node("Mul", ["d", "b"], ["e"], "m/Mul_2"),
    ]
    inner = [
        helper.make_node("Constant", [], ["t"], value=third),
        helper.make_node("Add", ["x", "t"], ["y"]),
    ]
    opset = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    function = helper.make_function(DOMAIN, "AddThird", ["x"], ["y"], inner, opset[:1])
    values = {name: helper.make_tensor_value_info(name, kind, ["n"]) for name in "abe"}
    graph = helper.make_graph(nodes, "g", [values["a"], values["b"]], [values["e"]])
    return Program(helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, functions=[function]))


@pytest.mark.parametrize("name", TYPES)
def test_each_operator_is_rounded(name: str) -> None:
    dtype, kind = TYPES[name]
    made = program(kind, dtype)
    onnx.checker.check_model(made.model)
    a, b = np.random.default_rng(0).standard_normal((2, 1000)).astype(dtype)
    third, wide = np.float32(np.array(1 / 3, dtype)), np.float32
    sums = ((a.astype(wide) * b.astype(wide)).astype(dtype).astype(wide) + third).astype(dtype)
    expected = (sums.astype(wide) * b.astype(wide)).astype(dtype)
    with BodiesOnOnnxRuntime(ArrayReader({}), 1)(made, ()) as runner:
        (got,) = infer(runner, {"a": a, "b": b}).values()
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected.astype(wide))
    assert (got != ((a.astype(wide) * b.astype(wide) + third) * b.astype(wide)).astype(dtype).astype(wide)).any()
