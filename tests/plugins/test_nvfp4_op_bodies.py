"""The bodies of NVFP4 ops: the numbers that E2M1 codes, E4M3 scales and global scales stand for, by others' types."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import helper
from opmodels import op_model, run_op
from readers import ArrayReader

from moecompiler.config import NormalizationMode
from moecompiler.graph import ONNX_DTYPES
from moecompiler.materializing import Materializer
from moecompiler.ops import OpSpec
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.plugins.quantized.dequantize import dequantize_spec, form_of
from moecompiler.plugins.quantized.linear import linear_spec
from moecompiler.plugins.quantized.moe import quantized_moe_spec
from moecompiler.quantization.schemes import NVFP4
from moecompiler.weights import Part, Quantized, Recipe, whole

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes, scales, global scales
nvfp4 = form_of(NVFP4)
assert nvfp4 is not None


def parts_of(weight: np.ndarray) -> Parts:
    """What an op takes for a weight ``[..., out, in]``, as rows."""
    rows, columns = int(np.prod(weight.shape[:-1])), weight.shape[-1]
    source, tensors = whole("w", str(weight.dtype), weight.shape), Materializer(ArrayReader({"w": weight}))
    wanted = {
        Part.CODES: ("int8", (rows, columns // 2)),
        Part.SCALES: ("int8", (rows, columns // 16)),
        Part.GLOBAL_SCALES: ("float32", (rows,)),
    }
    recipes = (Recipe(kind, shape, quantized=Quantized(source, NVFP4, part)) for part, (kind, shape) in wanted.items())
    codes, scales, global_scales = (tensors.tensor(recipe) for recipe in recipes)
    return codes, scales, global_scales


def numbers(parts: Parts) -> np.ndarray:
    """``[rows, in]`` float32, by ml_dtypes' E2M1 and E4M3."""
    codes, scales, global_scales = parts
    halves = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], axis=-1)
    blocks = halves.view(ml_dtypes.float4_e2m1fn).astype(np.float32).reshape(*scales.shape, 16)
    multipliers = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * global_scales[:, None]
    return (blocks * multipliers[..., None]).reshape(len(codes), -1)


def run(spec: OpSpec, attributes: dict[str, Any], *inputs: Any) -> np.ndarray:
    """A tuple's arrays become initializers, as weights are."""
    floats = next((array.dtype for array in inputs if isinstance(array, np.ndarray)), np.dtype(np.float32))
    model, feeds = op_model(spec, attributes, ONNX_DTYPES[str(floats)]), {}
    arrays = [(each, given) for given in inputs for each in (given if isinstance(given, tuple) else (given,))]
    for value, (array, given) in zip(spec.inputs, arrays, strict=True):
        if isinstance(given, tuple):
            kind = ONNX_DTYPES[str(array.dtype)]
            model.graph.initializer.append(helper.make_tensor(value.name, kind, array.shape, array.tobytes(), raw=True))
            del model.graph.input[[each.name for each in model.graph.input].index(value.name)]
        else:
            feeds[value.name] = array
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0])


def test_every_code_and_every_scale() -> None:
    """All bytes, and all numbers that a scale may be, bit for bit; -0 too."""
    scales = np.tile(np.arange(1, 127, dtype=np.int8), 3)[: 18 * 16].reshape(18, 16)
    codes = np.resize(np.arange(256, dtype=np.uint8), (18, 128)).view(np.int8)
    parts = codes, scales, np.linspace(1e-4, 3, 18, dtype=np.float32)
    got, expected = run(dequantize_spec(nvfp4), {}, parts), numbers(parts)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_linear(dtype: type) -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((24, 48)).astype(dtype), rng.standard_normal((2, 5, 48)).astype(dtype)
    parts = parts_of(weight)
    expected = numbers(parts).astype(dtype)  # rounded once
    assert 0.01 < np.abs(expected - weight).max() < 1
    got = run(linear_spec(nvfp4), {}, x, parts)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype is np.float32 else 0.02
    np.testing.assert_allclose(got, x.astype(np.float32) @ expected.T.astype(np.float32), atol=tolerance)


@pytest.mark.parametrize("mode", list(NormalizationMode))
def test_moe(mode: NormalizationMode) -> None:
    """As ``MoE`` with the numbers that codes stand for; each expert, larger than the last, has a global scale of its own."""
    rng = np.random.default_rng(1)
    x, router = rng.standard_normal((7, 32)).astype(np.float32), rng.standard_normal((5, 32)).astype(np.float32)
    larger = np.array([1, 3, 9], np.float32)[:, None, None]
    gate_up, down = (
        rng.standard_normal((3, 96, 32)).astype(np.float32) * larger,
        rng.standard_normal((3, 32, 48)).astype(np.float32),
    )
    expert_ids, attributes = np.array([0, 2, 3]), {"top_k": 2, "normalization_mode": int(mode)}
    parts = parts_of(gate_up), parts_of(down)
    assert len(set(parts[0][2])) == 3
    floats = [numbers(each).reshape(weight.shape) for each, weight in zip(parts, (gate_up, down), strict=True)]
    (expected,) = run_op(moe_spec(mode, 2), attributes, x, router, *floats, expert_ids)
    got = run(quantized_moe_spec(mode, 2, nvfp4), attributes, x, router, *parts, expert_ids)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected).max() > 1
