"""Weights to codes and back, against ONNX's QuantizeLinear and DequantizeLinear, and within half a step of the weight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_linear import as_onnx, attributes, run, with_block_axis

from moecompiler.errors import UserError
from moecompiler.quantization import arithmetic, chunks
from moecompiler.quantization.arithmetic import dequantize, encode, quantize
from moecompiler.quantization.encodings import decode_e2m1, decode_e4m3, widen
from moecompiler.quantization.scales import Scales, find_scales
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, Format, Granularity, QuantizedTensor, WeightScheme, int4
from moecompiler.weights import NUMPY_DTYPES

FP8_CHANNEL = WeightScheme(Format.E4M3, Granularity.CHANNEL)
SCHEMES = (INT8, int4(32), int4(None), int4(16, symmetric=False), int4(None, symmetric=False), FP8, FP8_CHANNEL, NVFP4)
EACH_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
FLOATS = ("float16", "bfloat16", "float32")
# by ONNX's reference evaluator; by ONNX Runtime, whose CPU provider has no such kernels for bfloat16
IMPLEMENTATIONS = [*((dtype, False) for dtype in FLOATS), ("float16", True), ("float32", True)]


def weight(dtype: str = "float32", shape: tuple[int, ...] = (3, 6, 64), seed: int = 0) -> np.ndarray:
    """Rows of unlike size, as a model's are; the last all zeros, the first with a block of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 0.02 * 2.0 ** rng.integers(-4, 4, (*shape[:-1], 1))
    values[..., -1, :] = 0
    values[..., 0, :32] = 0
    return values.astype(NUMPY_DTYPES[dtype])


def steps(tensor: QuantizedTensor) -> np.ndarray:
    """How far apart the codes' numbers are about each weight."""
    form = tensor.scheme.format
    scales = tensor.scales.astype(np.float32)
    if tensor.global_scale is not None:
        scales = scales * tensor.global_scale[..., None, None]
    if tensor.scheme.granularity is Granularity.TENSOR:
        spread = np.broadcast_to(scales[..., None, None], tensor.shape)
    else:
        per_row = scales if tensor.scheme.granularity is Granularity.BLOCK else scales[..., None]
        spread = np.repeat(per_row, tensor.shape[-1] // per_row.shape[-1], axis=-1)
    if form in (Format.E4M3, Format.E2M1):
        numbers = np.abs(decode_e4m3(tensor.codes) if form is Format.E4M3 else decode_e2m1(tensor.codes))
        mantissa, smallest = (3, 2.0**-6) if form is Format.E4M3 else (1, 1.0)
        return spread * 2.0 ** (np.floor(np.log2(np.maximum(numbers, smallest))) - mantissa)
    return spread


@EACH_SCHEME
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_is_within_half_a_step(scheme: WeightScheme, dtype: str) -> None:
    original = weight(dtype)
    tensor = quantize(original, scheme, dtype)
    assert tensor.codes.dtype == scheme.format.dtype
    assert tensor.scales.shape == scheme.scale_shape(original.shape)
    assert tensor.scales.dtype == (Format.E4M3.dtype if scheme is NVFP4 else NUMPY_DTYPES[dtype])
    exact = dequantize(
        QuantizedTensor(scheme, tensor.codes, _as_float32(tensor), tensor.zero_points, tensor.global_scale)
    )
    error = np.abs(exact.astype(np.float64) - original.astype(np.float64))
    # a scale rounded down leaves its largest weight beyond the range: E4M3 (of NVFP4's blocks) has 4 significant bits
    rounding = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-23}[dtype] if scheme is not NVFP4 else 2**-4
    assert (error <= 0.5001 * steps(tensor) + rounding * np.abs(original.astype(np.float64))).all()
    np.testing.assert_array_equal(dequantize(tensor, "float32")[original == 0], 0)


def _as_float32(tensor: QuantizedTensor) -> np.ndarray:
    return tensor.scales if tensor.scheme is NVFP4 else widen(tensor.scales)


@EACH_SCHEME
@pytest.mark.parametrize(("dtype", "runtime"), IMPLEMENTATIONS)
def test_dequantize_is_that_of_onnx(scheme: WeightScheme, dtype: str, runtime: bool) -> None:
    runtime = runtime and scheme.format is not Format.E2M1  # ONNX Runtime's CPU provider has no such kernel
    tensor = quantize(weight(dtype), scheme, dtype)
    scales = tensor.scales
    if tensor.global_scale is not None:
        scales = run("DequantizeLinear", [scales, tensor.global_scale], False, axis=0)
    inputs = [as_onnx(tensor.codes, scheme.format), with_block_axis(scales, scheme)]
    if tensor.zero_points is not None:
        inputs.append(as_onnx(with_block_axis(tensor.zero_points, scheme), scheme.format))
    theirs = run("DequantizeLinear", inputs, runtime, **attributes(scheme, tensor.shape))
    ours = dequantize(tensor)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))


@EACH_SCHEME
@pytest.mark.parametrize("runtime", [False, True], ids=["reference", "onnxruntime"])
def test_quantize_is_that_of_onnx(scheme: WeightScheme, runtime: bool) -> None:
    runtime = runtime and scheme.format is not Format.E2M1
    original = weight()
    tensor = quantize(original, scheme, "float32")
    scales = tensor.scales
    if tensor.global_scale is not None:
        scales = scales.astype(np.float32) * tensor.global_scale[..., None, None]
    zeros = np.zeros(scales.shape, scheme.format.dtype) if tensor.zero_points is None else tensor.zero_points
    inputs = [original, with_block_axis(scales, scheme), as_onnx(with_block_axis(zeros, scheme), scheme.format)]
    theirs = run("QuantizeLinear", inputs, runtime, **attributes(scheme, original.shape))
    np.testing.assert_array_equal(as_onnx(tensor.codes, scheme.format).astype(np.float32), theirs.astype(np.float32))


@EACH_SCHEME
def test_chunks_and_threads_change_nothing(scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    original = weight("bfloat16", (2, 7, 64))
    expected = quantize(original, scheme, "bfloat16")
    monkeypatch.setattr(chunks, "CHUNK", 128)  # two rows: each matrix ends in a chunk of one
    for threads in (1, 3):
        check_same(quantize(original, scheme, "bfloat16", threads), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_looking_codes_up_changes_nothing(dtype: str) -> None:
    large = weight(dtype, (2, 256, 128))
    assert large.size >= arithmetic._TABLE
    check_same(quantize(large, FP8, dtype), quantize(large.astype(np.float32), FP8, dtype))


def check_same(ours: QuantizedTensor, theirs: QuantizedTensor) -> None:
    assert ours.scheme == theirs.scheme
    for field in ("codes", "scales", "zero_points", "global_scale", "order"):
        a, b = getattr(ours, field), getattr(theirs, field)
        assert (a is None) == (b is None), field
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, field)


@EACH_SCHEME
def test_part_of_a_weight_by_the_whole_weights_scales(scheme: WeightScheme) -> None:
    original = weight("float16")
    whole = quantize(original, scheme, "float16")
    found = find_scales(original, scheme, "float16")
    part = Scales(*(None if a is None else a[1:2] for a in (found.scales, found.zero_points, found.global_scale)))
    np.testing.assert_array_equal(encode(original[1:2], scheme, part).codes, whole.codes[1:2])


@given(st.integers(0, 2**32 - 1), st.sampled_from(SCHEMES), st.sampled_from([1e-38, 1e-7, 1.0, 1e30]))
@settings(max_examples=40, deadline=None)
def test_scales_are_positive_and_finite(seed: int, scheme: WeightScheme, size: float) -> None:
    original = weight("float32", (2, 32), seed) * np.float32(size)
    for dtype in ("bfloat16", "float32") if size > 1 else FLOATS:
        found = find_scales(original, scheme, dtype)
        for scales in (found.scales, found.global_scale):
            if scales is not None:
                assert (scales.astype(np.float32) > 0).all()
                assert np.isfinite(scales.astype(np.float32)).all()
        assert np.isfinite(dequantize(encode(original, scheme, found), "float32")).all()


def test_a_weight_of_two_axes_and_one_of_none() -> None:
    for scheme in SCHEMES:
        both = weight()
        check_codes = quantize(both[1], scheme, "float32")
        np.testing.assert_array_equal(check_codes.codes, quantize(both, scheme, "float32").codes[1])
        assert quantize(both[:0], scheme, "float32").codes.shape == (0, 6, 64)


def test_gptqs_order_is_undone() -> None:
    tensor = quantize(weight(shape=(4, 64)), int4(32), "float32")
    order = np.random.default_rng(0).permutation(64)
    permuted = QuantizedTensor(tensor.scheme, tensor.codes, tensor.scales, order=order)
    np.testing.assert_array_equal(dequantize(permuted)[:, order], dequantize(tensor))


@EACH_SCHEME
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(scheme: WeightScheme, odd: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 64)
    original = weight("bfloat16")
    found = find_scales(original, scheme, "bfloat16")
    original[1, 2, 3] = odd
    for threads in (1, 2):
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize(original, scheme, "bfloat16", threads)
        with pytest.raises(ValueError, match="NaN or infinity"):
            encode(original, scheme, found, threads)


def test_scales_beyond_float16_are_refused() -> None:
    large = np.full((2, 64), 1e8, np.float32)
    for scheme in (INT8, int4(32), int4(32, symmetric=False), FP8):
        with pytest.raises(OverflowError, match="a scale is beyond float16's range; use --dtype bfloat16"):
            quantize(large, scheme, "float16")
        assert np.isfinite(dequantize(quantize(large, scheme, "bfloat16"), "float32")).all()


@EACH_SCHEME
def test_views_are_quantized_as_they_look(scheme: WeightScheme) -> None:
    original = weight("bfloat16", (2, 64, 64))
    turned = original.swapaxes(-1, -2)
    check_same(quantize(turned, scheme, "bfloat16"), quantize(np.ascontiguousarray(turned), scheme, "bfloat16"))


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"weight: groups of 48 do not divide its 64 input features"):
        quantize(weight(), int4(48), "float32")
    with pytest.raises(ValueError, match="takes"):
        encode(weight(), INT8, Scales(np.ones(6, np.float32)))
    with pytest.raises(ValueError, match="block size None"):
        WeightScheme(Format.INT4, Granularity.BLOCK)
    with pytest.raises(ValueError, match="NVFP4 has blocks of 16"):
        WeightScheme(Format.E2M1, Granularity.BLOCK, 32)
