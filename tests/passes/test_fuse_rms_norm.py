"""RMS normalization in its spellings becomes one op; what only looks like it stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import parser

from moecompiler.graph import Program
from moecompiler.passes.fuse_rms_norm import FuseRMSNorm
from moecompiler.pipeline import apply

GRAPH = """
<ir_version: 10, opset_import: ["": 21]>
g ({type}[batch, 3, 8] x) => ({type}[batch, 3, 8] y)
<{type}[8] weight = {{1, 2, 3, 4, 5, 6, 7, 8}}, float two = {{2}}, float one = {{1}}, float half = {{-0.5}},
 float eps = {{0.01}}, int64[1] last = {{-1}}, int64[1] first = {{1}},
 float[batch, 3, 8] wide, float[batch, 3, 8] scaled, {type}[batch, 3, 8] narrow>
{{
{body}
}}
"""
MIXTRAL = """
  wide = Cast<to = 1>(x)
  square = Pow(wide, two)
  mean = ReduceMean(square, last)
  shifted = Add(mean, eps)
  root = Sqrt(shifted)
  inverse = Reciprocal(root)
  scaled = Mul(wide, inverse)
  narrow = Cast<to = {code}>(scaled)
  y = Mul(weight, narrow)
"""


def program(body: str, dtype: str = "float16") -> Program:
    code = {"float16": 10, "float": 1}[dtype]
    return Program(parser.parse_model(GRAPH.format(type=dtype, body=body.format(code=code))))


def changed(*replacements: tuple[str, str]) -> str:
    body = MIXTRAL
    for old, new in replacements:
        assert old in body
        body = body.replace(old, new)
    return body


SPELLINGS = {
    "mixtral": MIXTRAL,
    "operands the other way": changed(
        ("Mul(weight, narrow)", "Mul(narrow, weight)"),
        ("Mul(wide, inverse)", "Mul(inverse, wide)"),
        ("Add(mean, eps)", "Add(eps, mean)"),
    ),
    "square by product": changed(("Pow(wide, two)", "Mul(wide, wide)")),
    "one over the root": changed(("Reciprocal(root)", "Div(one, root)")),
    "divided by the root": changed(("inverse = Reciprocal(root)\n", ""), ("Mul(wide, inverse)", "Div(wide, root)")),
    "power of minus a half": changed(
        ("root = Sqrt(shifted)\n", ""), ("inverse = Reciprocal(root)", "inverse = Pow(shifted, half)")
    ),
}
NEAR_MISSES = {
    "another axis": (changed(("(square, last)", "(square, first)")), "it reduces axes [1], not the last"),
    "a cube": (changed(("Pow(wide, two)", "Pow(wide, one)")), "is not 2.0"),
    "the sum": (changed(("ReduceMean", "ReduceSum")), "ReduceSum where ReduceMean was expected"),
    "normalized by another tensor": (
        changed(("wide = Cast<to = 1>(x)", "wide = Cast<to = 1>(x)\n  other = Neg(wide)"), ("Pow(wide", "Pow(other")),
        "which stands for wide elsewhere",
    ),
}


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", ["float16", "float"])
def test_each_spelling_becomes_the_op(spelling: str, dtype: str) -> None:
    before = program(SPELLINGS[spelling], dtype)
    after, result = apply(FuseRMSNorm(), before)
    assert result.matches == 1
    (node,) = after.model.graph.node
    assert (node.domain, node.op_type, list(node.input)) == ("moecompiler", "RMSNorm", ["x", "weight"])
    assert onnx.helper.get_node_attr_value(node, "epsilon") == pytest.approx(0.01)
    onnx.checker.check_model(after.model, full_check=True)
    x = 3 * np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float16 if dtype == "float16" else np.float32)
    np.testing.assert_allclose(run(after.model, x), run(before.model, x), rtol=1e-3 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_and_say_why(name: str) -> None:
    body, reason = NEAR_MISSES[name]
    before = program(body)
    after, result = apply(FuseRMSNorm(), before)
    assert result.matches == 0
    assert len(after.model.graph.node) == len(before.model.graph.node)
    assert reason in FuseRMSNorm().nearest_miss(gs.import_onnx(before.model), {}).reason


def test_an_inner_value_that_is_read_elsewhere_is_not_swallowed() -> None:
    model = program(MIXTRAL).model
    model.graph.output.append(onnx.helper.make_tensor_value_info("scaled", onnx.TensorProto.FLOAT, ["batch", 3, 8]))
    after, result = apply(FuseRMSNorm(), Program(model))
    assert result.matches == 0
    reason = FuseRMSNorm().nearest_miss(gs.import_onnx(model), {}).reason
    assert reason == "scaled, inside it, is an output of the graph"
    assert len(after.model.graph.node) == 9


def test_twice_changes_nothing_more() -> None:
    once, _ = apply(FuseRMSNorm(), program(MIXTRAL))
    twice, result = apply(FuseRMSNorm(), once)
    assert result.matches == 0
    assert twice.model.SerializeToString(deterministic=True) == once.model.SerializeToString(deterministic=True)
