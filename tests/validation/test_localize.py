"""Cutting a part out of a graph."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import parser

from moecompiler.validation.localize import cut

GRAPH = """
<ir_version: 10, opset_import: ["": 21]>
g (float[n] x) => (float[n] z) <float[1] w = {2.0}, float[n] a, float[n] b, float[n] c>
{
  a = Mul(x, w)
  b = Add(a, x)
  c = Neg(a)
  z = Sub(b, c)
}
"""


@pytest.mark.parametrize(
    ("output", "stops", "inputs", "ops"),
    [
        ("b", set(), ["x"], ["Mul", "Add"]),
        ("b", {"a"}, ["a", "x"], ["Add"]),
        ("z", {"a", "b"}, ["a", "b"], ["Neg", "Sub"]),
        ("a", {"a"}, ["x"], ["Mul"]),
    ],
)
def test_cut_holds_what_the_output_needs(output: str, stops: set[str], inputs: list[str], ops: list[str]) -> None:
    part = cut(parser.parse_model(GRAPH), output, stops)
    assert [value.name for value in part.graph.input] == inputs
    assert [node.op_type for node in part.graph.node] == ops
    assert [value.name for value in part.graph.output] == [output]


def test_a_part_computes_what_the_whole_does() -> None:
    part = cut(parser.parse_model(GRAPH), "z", {"a"})
    x = np.array([1.0, -3.0], np.float32)
    session = onnxruntime.InferenceSession(part.SerializeToString())
    (z,) = session.run(None, {"a": 2 * x, "x": x})
    np.testing.assert_array_equal(z, 5 * x)
