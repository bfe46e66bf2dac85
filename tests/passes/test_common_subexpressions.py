"""What is computed twice is computed once; what only looks alike stays."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import facts, program

from moecompiler.passes.common_subexpressions import CommonSubexpressions
from moecompiler.pipeline import apply

TWICE = """
g (float[n] x) => (float[n] z) <float[1] one = {1.0}, float[1] also_one = {1.0}, float[1] two = {2.0}>
{
  ["a/Add_0"] a = Add (x, one)
  ["b/Add_1"] b = Add (x, also_one)
  ["c/Neg_2"] c = Neg (a)
  ["d/Neg_3"] d = Neg (b)
  ["e/Mul_4"] z = Mul (c, d)
}
"""
ONCE = """
g (float[n] x) => (float[n] z) <float[1] one = {1.0}>
{
  ["a/Add_0"] a = Add (x, one)
  ["c/Neg_2"] c = Neg (a)
  ["e/Mul_4"] z = Mul (c, c)
}
"""


def test_equal_chains_become_one() -> None:
    after, result = apply(CommonSubexpressions(), program(TWICE))
    assert facts(after)["nodes"] == facts(program(ONCE))["nodes"]
    assert [(change.module, change.what) for change in result.changes] == [
        ("b", "merged Add into a/Add_0"),
        ("d", "merged Neg into c/Neg_2"),
    ]


@pytest.mark.parametrize(
    "second",
    ["b = Add (x, two)", "b = Sub (x, one)", "b = Add (one, x)", "b = moecompiler.AllReduce <group = [0, 1]> (x)"],
)
def test_what_differs_stays(second: str) -> None:
    text = TWICE.replace('["b/Add_1"] b = Add (x, also_one)', f'["b/Add_1"] {second}')
    assert apply(CommonSubexpressions(), program(text))[1].matches == 0


def test_attributes_count() -> None:
    text = """
    g (float[3, 4] x) => (float[3, 4] z)
    {
      a = Softmax <axis = 0> (x)
      b = Softmax <axis = 1> (x)
      z = Add (a, b)
    }
    """
    assert apply(CommonSubexpressions(), program(text))[1].matches == 0


def test_graph_outputs_keep_their_writer() -> None:
    text = """
    g (float[n] x) => (float[n] y, float[n] z)
    {
      y = Neg (x)
      z = Neg (x)
    }
    """
    before = program(text)
    after, result = apply(CommonSubexpressions(), before)
    assert result.matches == 0
    assert facts(after)["outputs"] == facts(before)["outputs"]


def test_collectives_are_never_merged() -> None:
    text = """
    g (float[n] x) => (float[n] z)
    {
      a = moecompiler.AllReduce <group = [0, 1]> (x)
      b = moecompiler.AllReduce <group = [0, 1]> (x)
      z = Add (a, b)
    }
    """
    assert apply(CommonSubexpressions(), program(text))[1].matches == 0


def test_numbers_stay_and_twice_changes_nothing_more() -> None:
    import onnxruntime

    before = program(TWICE)
    once, _ = apply(CommonSubexpressions(), before)
    x = np.array([0.5, -2.0], np.float32)
    results = [
        onnxruntime.InferenceSession(each.model.SerializeToString()).run(None, {"x": x})[0] for each in (before, once)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    twice, result = apply(CommonSubexpressions(), once)
    assert result.matches == 0
    assert twice.model.SerializeToString(deterministic=True) == once.model.SerializeToString(deterministic=True)
