"""Where an output's dims come from."""

from __future__ import annotations

import pytest

from moecompiler.ops import OpSpec, Value
from moecompiler.plugins.library import plugin_ops
from moecompiler.plugins.output_dims import output_dims


def spec(*inputs: Value) -> OpSpec:
    return OpSpec("Odd", inputs, (Value("y", ("...", "out")),), {}, "")


def test_dims_of_several_inputs() -> None:
    odd = spec(Value("x", ("...", "in")), Value("weight", ("out", "in")))
    (y,) = odd.outputs
    assert output_dims(odd, y, [["a", "b", "in"], ["out", "packed"]]) == ["a", "b", "out"]
    assert output_dims(odd, y, [["in"], ["out", "packed"]]) == ["out"]


def test_the_input_that_is_like_it_gives_all() -> None:
    odd = spec(Value("other", ("...", "in")), Value("weight", ("out", "in")), Value("before", ("...", "out")))
    (y,) = odd.outputs
    assert output_dims(odd, y, [["a", "in"], ["o", "in"], ["b", "out"]]) == ["b", "out"]
    typed = spec(Value("weight", ("out", "in")), Value("before", ("...", "out"), "int8"), Value("x", ("...", "in")))
    assert output_dims(typed, y, [["o", "in"], ["b", "p"], ["a", "in"]]) == ["b", "o"]


def test_a_dim_of_no_input() -> None:
    odd = spec(Value("x", ("...", "in")))
    with pytest.raises(ValueError, match="Odd: no input has the dim out of output y"):
        output_dims(odd, odd.outputs[0], [["a", "in"]])


def test_every_plugin_has_its_outputs_dims() -> None:
    for op in plugin_ops().values():
        inputs = [list(value.dims) for value in op.spec.inputs]
        for output in op.spec.outputs:
            assert output_dims(op.spec, output, inputs) == list(output.dims), op.spec.name
