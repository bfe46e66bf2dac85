"""The bodies of FP8 ops: inputs rounded to E4M3 by static scales, as torch rounds, and multiplied with what codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from opmodels import op_model

from moecompiler.config import NormalizationMode
from moecompiler.graph import ONNX_DTYPES
from moecompiler.ops import OpSpec
from moecompiler.plugins.quantized.dequantize import form_of
from moecompiler.plugins.quantized.linear import linear_spec
from moecompiler.plugins.quantized.moe import quantized_moe_spec
from moecompiler.plugins.quantized.rounding import round_by_expert_spec
from moecompiler.quantization.schemes import FP8
from moecompiler.routing import route

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float16])
fp8 = form_of(FP8)
assert fp8 is not None


def rounded(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """To E4M3 and back by torch, saturating; scales along the first axis, or one."""
    scales = scales.astype(np.float32).reshape(-1, *(1,) * (x.ndim - 1 if x.ndim > 2 else 2))
    quotients = torch.from_numpy(x.astype(np.float32) / scales).clamp(-448, 448)
    return (quotients.to(torch.float8_e4m3fn).float().numpy() * scales).astype(x.dtype)


def codes_of(weight: np.ndarray, scale: float) -> torch.Tensor:
    return (torch.from_numpy(weight.astype(np.float32)) / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def run(
    spec: OpSpec, attributes: dict[str, Any], *inputs: Any, leading: Sequence[str] = ("batch", "sequence")
) -> np.ndarray:
    """Codes, tensors of torch, become initializers, as weights are."""
    model = op_model(spec, attributes, ONNX_DTYPES[str(inputs[0].dtype)], leading)
    feeds = {}
    for value, given in zip(spec.inputs, inputs, strict=True):
        if isinstance(given, torch.Tensor):
            raw = given.view(torch.uint8).numpy().tobytes()
            kind = TensorProto.FLOAT8E4M3FN
            model.graph.initializer.append(helper.make_tensor(value.name, kind, given.shape, raw, raw=True))
            del model.graph.input[[each.name for each in model.graph.input].index(value.name)]
        else:
            feeds[value.name] = given
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0])


@DTYPES
def test_linear(dtype: type) -> None:
    """Inputs beyond the scale's range among them, which saturate, and numbers between the least codes."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 5, 32)) * np.exp(rng.uniform(-9, 2, 32))).astype(dtype)
    weight = rng.standard_normal((24, 32)).astype(dtype)
    scales, input_scales = np.linspace(0.01, 0.02, 24).astype(dtype), np.array([0.005], dtype)
    codes = codes_of(weight, 0.015)
    got = run(linear_spec(fp8), {}, x, codes, scales, input_scales)
    inputs, weights = rounded(x, input_scales), codes.float().numpy() * scales[:, None].astype(np.float32)
    expected = inputs.astype(np.float32) @ weights.astype(dtype).astype(np.float32).T
    assert np.abs(x).max() > 448 * 0.005 > np.abs(inputs).max() - 1e-3
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(np.float32), expected, atol=1e-5 if dtype == np.float32 else 2e-2)
    unrounded = x.astype(np.float32).clip(-2.24, 2.24) @ weights.T
    assert np.abs(unrounded - expected).max() > 0.05


@DTYPES
def test_rounding_by_expert(dtype: type) -> None:
    """Bit for bit: one scale for each expert, of the same tokens or of their own."""
    rng = np.random.default_rng(1)
    scales = np.array([0.003, 0.01, 0.7], dtype)
    for shape in ((7, 16), (3, 7, 16)):
        x = rng.standard_normal(shape).astype(dtype)
        got = run(round_by_expert_spec(), {}, x, scales, leading=["experts"][: x.ndim - 2])
        np.testing.assert_array_equal(got, rounded(np.broadcast_to(x, (3, 7, 16)), scales))
        assert np.abs(got - x).max() > 0


@pytest.mark.parametrize("mode", list(NormalizationMode))
def test_moe(mode: NormalizationMode) -> None:
    """Local experts one by one, as ``MoE`` with one expert computes them on rounded inputs; routed by what is not rounded."""
    rng = np.random.default_rng(2)
    x, router = rng.standard_normal((7, 32)).astype(np.float32), rng.standard_normal((5, 32)).astype(np.float32)
    gate_up, down = (rng.standard_normal(shape).astype(np.float32) / 4 for shape in ((3, 96, 32), (3, 32, 48)))
    expert_ids, routing = np.array([0, 2, 3]), {"top_k": 2, "normalization_mode": int(mode)}
    codes = [codes_of(weight.reshape(-1, weight.shape[-1]), 0.01) for weight in (gate_up, down)]
    scales = [np.linspace(0.01, 0.02, len(each)).astype(np.float32) for each in codes]
    input_scales = np.array([0.004, 0.006, 0.02], np.float32), np.array([0.01, 0.03, 0.005], np.float32)
    spec = quantized_moe_spec(mode, 2, fp8)
    got = run(spec, routing, x, router, codes[0], scales[0], codes[1], scales[1], *input_scales, expert_ids)

    weights, chosen = route(torch.from_numpy(x @ router.T), 2, mode)
    shares = torch.zeros(7, 5).scatter(1, chosen, weights).numpy()
    expected = np.zeros_like(x)
    numbers = [
        (each.float().numpy() * scale[:, None]).reshape(whole.shape)
        for each, scale, whole in zip(codes, scales, (gate_up, down), strict=True)
    ]
    for index, expert in enumerate(expert_ids):
        both = rounded(x, input_scales[0][index : index + 1])[0] @ numbers[0][index].T
        gate, up = both[:, :48], both[:, 48:]
        inner = rounded((gate / (1 + np.exp(-gate)) * up).astype(np.float32), input_scales[1][index : index + 1])[0]
        expected += shares[:, expert, None] * (inner @ numbers[1][index].T)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(expected).max() > 1
