"""Shares of quantized weights: quantize-then-shard against shard-then-quantize, and against the numbers of the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_arithmetic import SCHEMES, check_same, weight

from moecompiler.errors import UserError
from moecompiler.quantization.arithmetic import dequantize, encode, quantize
from moecompiler.quantization.scales import Scales
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, Granularity, QuantizedTensor, WeightScheme, int4
from moecompiler.quantization.slicing import Axis, cut, experts, joined, share, stacked

# the schemes whose scales are made of nothing outside the share: there both orders give the same
EXACT = {
    Axis.OUT: [s for s in SCHEMES if s.granularity is not Granularity.TENSOR and not s.two_level],
    Axis.IN: [s for s in SCHEMES if s.granularity is Granularity.BLOCK and not s.two_level],
}


def part(values: np.ndarray, axis: Axis, rank: int, parts: int) -> np.ndarray:
    return np.split(values, parts, axis=-2 if axis is Axis.OUT else -1)[rank]


CUTS = st.tuples(st.sampled_from(Axis), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.integers(0, 2**32 - 1))


@given(st.sampled_from(SCHEMES), CUTS)
@settings(max_examples=60, deadline=None)
def test_shares_are_the_wholes(scheme: WeightScheme, how: tuple[Axis, int, int, int]) -> None:
    axis, parts, rank, seed = how
    rank %= parts
    original = weight("bfloat16", (2, 4, 128), seed)
    whole = quantize(original, scheme, "bfloat16")
    ours = share(whole, axis, rank, parts, "w")
    assert ours.scales.shape == scheme.scale_shape(ours.shape)
    np.testing.assert_array_equal(dequantize(ours), part(dequantize(whole), axis, rank, parts))
    of_part = part(original, axis, rank, parts)
    if scheme in EXACT[axis]:
        check_same(ours, quantize(of_part, scheme, "bfloat16"))
    # with the whole's scales, it does not matter when the share is cut
    check_same(ours, encode(of_part, scheme, Scales(ours.scales, ours.zero_points, ours.global_scale)))


@pytest.mark.parametrize(
    ("scheme", "axis"), [(INT8, Axis.IN), (FP8, Axis.IN), (FP8, Axis.OUT), (NVFP4, Axis.IN), (NVFP4, Axis.OUT)], ids=str
)
def test_where_the_orders_differ(scheme: WeightScheme, axis: Axis) -> None:
    """The documented difference: scales of the share alone are finer for integers, and neither here nor there for floats."""
    original = weight("float32", (4, 256), seed=3)
    original[0, 0] = 1  # in the first share, and the largest
    whole, own = quantize(original, scheme, "float32"), quantize(part(original, axis, 1, 2), scheme, "float32")
    ours = share(whole, axis, 1, 2, "w")
    assert not np.array_equal(ours.codes, own.codes)

    def error(tensor: QuantizedTensor) -> float:
        return float(np.square(dequantize(tensor) - part(original, axis, 1, 2)).mean())

    assert error(own) < error(ours) * (1 if scheme is INT8 else 2)
    assert scheme is INT8 or error(ours) < 2 * error(own)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_experts_are_quantized_apart(scheme: WeightScheme) -> None:
    original = weight("float16", (4, 6, 64))
    whole = quantize(original, scheme, "float16")
    check_same(experts(whole, 1, 3), quantize(original[1:3], scheme, "float16"))
    each = [quantize(matrix, scheme, "float16") for matrix in original]
    check_same(stacked(each, "w"), whole)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s is not NVFP4], ids=str)
def test_joined_weights_keep_their_numbers(scheme: WeightScheme) -> None:
    tensors = [quantize(weight("float32", (2, rows, 64), rows), scheme, "float32") for rows in (2, 5, 3)]
    together = joined(tensors, "qkv")
    np.testing.assert_array_equal(dequantize(together), np.concatenate([dequantize(t) for t in tensors], axis=-2))
    assert together.scales.shape == together.scheme.scale_shape(together.shape)
    assert together.scheme.format is scheme.format


def test_joined_nvfp4_has_one_global_scale() -> None:
    first, second = (quantize(weight("float32", (4, 64), seed), NVFP4, "float32") for seed in (0, 1))
    with pytest.raises(UserError, match="qkv: the weights that are joined have different global scales"):
        joined([first, second], "qkv")
    second = replace(second, global_scale=first.global_scale)
    both = np.concatenate([dequantize(first), dequantize(second)])
    np.testing.assert_array_equal(dequantize(joined([first, second], "qkv")), both)


def ordered(seed: int = 0) -> QuantizedTensor:
    tensor = quantize(weight("float32", (4, 64)), int4(32), "float32")
    return replace(tensor, order=np.random.default_rng(seed).permutation(64))


def test_features_in_another_order() -> None:
    tensor = ordered()
    np.testing.assert_array_equal(dequantize(cut(tensor, Axis.OUT, 1, 3, "w")), dequantize(tensor)[1:3])
    pair = stacked([tensor, ordered(1)], "w")
    np.testing.assert_array_equal(dequantize(pair)[1], dequantize(ordered(1)))
    np.testing.assert_array_equal(dequantize(experts(pair, 1, 2))[0], dequantize(ordered(1)))
    both = dequantize(joined([tensor, tensor], "w"))
    np.testing.assert_array_equal(both, np.concatenate([dequantize(tensor)] * 2))
    with pytest.raises(UserError, match="w: quantized with act-order, whose groups cannot be split over ranks"):
        cut(tensor, Axis.IN, 0, 32, "w")
    with pytest.raises(UserError, match="w: the weights that are joined have different orders"):
        joined([tensor, ordered(1)], "w")


def test_what_cannot_be_cut_or_put_together() -> None:
    tensor = quantize(weight("float32", (6, 64)), int4(32), "float32")
    with pytest.raises(UserError, match=r"w: input features 0 to 16 are no whole groups of 32; .* divides 16"):
        share(tensor, Axis.IN, 0, 4, "w")
    with pytest.raises(UserError, match="w: its 6 output features do not divide over 4 ranks"):
        share(tensor, Axis.OUT, 0, 4, "w")
    other = quantize(weight("float32", (6, 64)), INT8, "float32")
    for combine in (stacked, joined):
        with pytest.raises(UserError, match="w: mixed formats: int4 per block 32, int8 per channel; they must be"):
            combine([tensor, other], "w")
        with pytest.raises(UserError, match="mixed formats: int4 per block 32, int4 per block 32 with act-order"):
            combine([tensor, replace(tensor, order=np.arange(64))], "w")
