"""The shape rule of ops: outputs' shapes from inputs', and inputs that do not fit together."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from moecompiler.config import NormalizationMode
from moecompiler.ops import OpSpec
from moecompiler.plugins.attention.op import ATTENTION
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM, RMS_NORM

MOE = moe_spec(NormalizationMode.RENORMALIZE, 2)
CACHE = ("batch", 2, 16, 8)
ATTENTION_INPUTS = [
    *(("batch", "sequence", size) for size in (64, 16, 16)),
    *[("batch", 1, "sequence", 8)] * 2,
    ("batch", "sequence"),
    *[CACHE] * 2,
]


@pytest.mark.parametrize(
    ("spec", "inputs", "outputs"),
    [
        (RMS_NORM, [("batch", "sequence", 32), (32,)], [["batch", "sequence", 32]]),
        (RMS_NORM, [(32,), (32,)], [[32]]),
        (ADD_RMS_NORM, [(7, 32), ("tokens", "hidden"), (32,)], [[7, 32], [7, 32]]),
        (MOE, [("tokens", 32), (8, 32), (4, 48, 32), (4, 32, 24), (4,)], [["tokens", 32]]),
        (ATTENTION, ATTENTION_INPUTS, [["batch", "sequence", 64], list(CACHE), list(CACHE)]),
    ],
)
def test_output_shapes(spec: OpSpec, inputs: list[tuple[int | str, ...]], outputs: list[list[int | str]]) -> None:
    assert spec.output_shapes(inputs) == outputs


@pytest.mark.parametrize(
    ("spec", "inputs", "said"),
    [
        (RMS_NORM, [("batch", 32), (31,)], "hidden of weight is 31, elsewhere 32"),
        (MOE, [("tokens", 32), (8, 32), (4, 48, 32), (3, 32, 24), (4,)], "local_experts of down is 3, elsewhere 4"),
        (MOE, [("tokens", 32), (8, 32), (48, 32), (4, 32, 24), (4,)], r"gate_up is \[48, 32\], not \[local_experts"),
    ],
)
def test_inputs_that_do_not_fit(spec: OpSpec, inputs: list[tuple[int | str, ...]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        spec.output_shapes(inputs)


def test_a_node_gives_its_outputs_their_shapes() -> None:
    x, y = gs.Variable("x", np.float32, ["tokens", 32]), gs.Variable("y", np.float32)
    weight = gs.Constant("w", np.ones(32, np.float32))
    RMS_NORM.node("norm", [x, weight], [y], {"epsilon": 1e-5})
    assert y.shape == ["tokens", 32]
