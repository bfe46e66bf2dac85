"""Weights that are quantized here, from recipes of boxes.

NVFP4's global scale is a matrix's. Here that is a tensor of the checkpoint, or what a rank holds of one: queries, keys and
values, gate and up, and experts have scales of their own, and the numbers do not depend on what a graph joins to one weight.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from moecompiler.clipping import clipped, clipping_of
from moecompiler.errors import UserError
from moecompiler.quantization.arithmetic import encode, quantize
from moecompiler.quantization.encodings import E4M3
from moecompiler.quantization.scales import find_scales
from moecompiler.quantization.schemes import Granularity, QuantizedTensor, WeightScheme
from moecompiler.weights import Piece, Recipe, TensorReader, materialize

_THREADS = 4  # numpy lets them calculate at the same time; with fewer cores they take turns


def quantize_boxes(source: Recipe, scheme: WeightScheme, reader: TensorReader) -> QuantizedTensor:
    """The weight ``source`` ``[..., out, in]`` in codes, its features in their own order where that is to be told; NVFP4's global
    scales by row, ``[..., out]``.

    Raises: UserError where the weight holds NaN or infinity, or blocks do not divide its input features; OverflowError where a
    finite weight or a scale does not fit the recipe's dtype.
    """
    weight = materialize(source, reader)
    try:
        if scheme.two_level:
            made = _by_box(weight, source, scheme)
        elif scheme.granularity is Granularity.TENSOR:
            made = _scales_by_row(weight, source, scheme)
        elif (ratios := clipping_of(source, scheme, reader)) is not None:
            scales = clipped(find_scales(weight, scheme, source.dtype, _THREADS), ratios, source.dtype)
            made = encode(weight, scheme, scales, _THREADS)
        else:
            made = quantize(weight, scheme, source.dtype, _THREADS)
    except ValueError as error:
        first, *others = sorted(source.sources)
        names = f"{first}, or {others[-1]}" if others else first
        raise UserError(f"{names}: cannot be quantized: {error}") from None
    features = np.arange(source.shape[-1])
    return replace(made, order=np.tile(features, (*source.shape[:-2], 1))) if scheme.act_order else made


def _by_box(weight: np.ndarray, source: Recipe, scheme: WeightScheme) -> QuantizedTensor:
    codes, scales = np.empty(weight.shape, np.uint8), np.empty(scheme.scale_shape(weight.shape), E4M3)
    global_scale = np.empty(weight.shape[:-1], np.float32)
    for rows in _boxes(source):
        part = quantize(weight[rows], scheme, "float32", _THREADS)
        assert part.global_scale is not None
        codes[rows], scales[rows], global_scale[rows] = part.codes, part.scales, part.global_scale[..., None]
    return QuantizedTensor(scheme, codes, scales, global_scale=global_scale)


def _scales_by_row(weight: np.ndarray, source: Recipe, scheme: WeightScheme) -> QuantizedTensor:
    """A scale per matrix, repeated for each of its rows: such a tensor may hold rows of several."""
    codes, scales = np.empty(weight.shape, scheme.format.dtype), np.empty(weight.shape[:-1], weight.dtype)
    for rows in _boxes(source):
        part = quantize(weight[rows], scheme, source.dtype, _THREADS)
        codes[rows], scales[rows] = part.codes, part.scales[..., None]
    return QuantizedTensor(WeightScheme(scheme.format, Granularity.CHANNEL), codes, scales)


def _boxes(source: Recipe) -> list[tuple[slice, ...]]:
    """The rows that each piece fills; all at once where pieces are not of whole rows."""
    whole_rows = all(piece.extent[-1] == source.shape[-1] for piece in source.pieces)
    if whole_rows and sum(prod(piece.extent) for piece in source.pieces) == prod(source.shape):
        return [_rows(piece) for piece in source.pieces]
    return [(slice(None),) * (len(source.shape) - 1)]


def _rows(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(at, at + count) for at, count in zip(piece.at[:-1], piece.extent[:-1], strict=True))
