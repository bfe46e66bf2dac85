"""Weights to codes and back.

Quantizing is float32 division by the scale, rounding to nearest even, and saturation: ONNX's ``QuantizeLinear`` in float32.
Dequantizing is ONNX's ``DequantizeLinear`` (opset 21), bit for bit: a code has at most 8 significant bits, so its product with a
float16 or bfloat16 scale is exact in float32 and is rounded once. NVFP4 is ``DequantizeLinear`` of the block scales by the
global one, in float32, then of the codes by the result.

Weights may be views of mapped files: they are read in the order they lie in, and besides the result no more is held than a
few chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moecompiler.quantization.chunks import Scratch, as_matrices, each_chunk
from moecompiler.quantization.encodings import (
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    encode_integer,
    largest_magnitude,
    widen,
)
from moecompiler.quantization.scales import Scales, find_scales
from moecompiler.quantization.schemes import Format, Granularity, QuantizedTensor, WeightScheme
from moecompiler.weights import NUMPY_DTYPES, Shape

_TABLE = 1 << 16  # different numbers of 16 bits

Encoder = Callable[[np.ndarray, np.ndarray, int, slice, Scratch], None]  # chunk, its codes, matrix, rows, memory


def quantize(weight: np.ndarray, scheme: WeightScheme, scale_dtype: str, threads: int = 1) -> QuantizedTensor:
    """``weight`` ``[..., out, in]``, float16, bfloat16 or float32, in codes; scales in ``scale_dtype`` (NVFP4: in its own).

    Raises: as ``find_scales``.
    """
    return _encode_weight(weight, scheme, find_scales(weight, scheme, scale_dtype, threads), threads)


def encode(weight: np.ndarray, scheme: WeightScheme, scales: Scales, threads: int = 1) -> QuantizedTensor:
    """``weight`` in codes by given scales, say those of a whole of which it is a part; what is beyond them saturates.

    Raises: ValueError for NaN or infinity, and where the scales have another shape; UserError where blocks do not divide the
    input features.
    """
    if scales.scales.shape != scheme.scale_shape(weight.shape):
        raise ValueError(f"scales {scales.scales.shape} for a weight that takes {scheme.scale_shape(weight.shape)}")
    matrices = as_matrices(weight, weight.ndim - 2)

    def check(m: int, rows: slice, scratch: Scratch) -> None:
        if not np.isfinite(largest_magnitude(matrices[m, rows], scratch)).all():
            raise ValueError("the weight holds NaN or infinity")

    each_chunk(check, weight.shape, threads)
    return _encode_weight(weight, scheme, scales, threads)


def dequantize(tensor: QuantizedTensor, dtype: str | None = None) -> np.ndarray:
    """The weight ``[..., out, in]`` that the codes stand for, its input features in their own order; in ``dtype``, or in the
    scales' dtype, NVFP4 in float32.

    Another dtype than the scales' rounds once more, as a ``Cast`` after ``DequantizeLinear`` does.
    """
    scheme = tensor.scheme
    values = _decode(tensor.codes, scheme.format).reshape(*_broadcast(tensor.scales, scheme).shape[:-1], -1)
    if tensor.zero_points is not None:
        values -= _broadcast(tensor.zero_points.astype(np.float32), scheme)
    values *= _broadcast(_multipliers(scheme, Scales(tensor.scales, None, tensor.global_scale)), scheme)
    values = values.reshape(tensor.shape)
    if tensor.order is not None:
        features = np.empty_like(values)
        np.put_along_axis(features, np.broadcast_to(tensor.order[..., None, :], values.shape), values, axis=-1)
        values = features
    if not scheme.two_level:
        values = values.astype(tensor.scales.dtype, copy=False)
    return values if dtype is None else values.astype(NUMPY_DTYPES[dtype], copy=False)


def _encode_weight(weight: np.ndarray, scheme: WeightScheme, scales: Scales, threads: int) -> QuantizedTensor:
    """As ``encode``, of a weight known to be finite."""
    codes = np.empty(weight.shape, scheme.format.dtype)
    multipliers = _multipliers(scheme, scales)
    if scheme.granularity is Granularity.TENSOR and weight.dtype.itemsize == 2 and weight.size >= _TABLE:
        encode_chunk = _by_table(weight.dtype, scheme, multipliers.reshape(-1))
    else:
        encode_chunk = _by_division(scheme, multipliers, scales.zero_points, weight.shape)

    into, matrices = as_matrices(codes, weight.ndim - 2), as_matrices(weight, weight.ndim - 2)

    def work(m: int, rows: slice, scratch: Scratch) -> None:
        with np.errstate(over="ignore"):  # which saturates, too
            encode_chunk(matrices[m, rows], into[m, rows], m, rows, scratch)

    each_chunk(work, weight.shape, threads)
    return QuantizedTensor(scheme, codes, scales.scales, scales.zero_points, scales.global_scale)


def _multipliers(scheme: WeightScheme, scales: Scales) -> np.ndarray:
    """What codes are multiplied by, float32, of the shape of the scales."""
    if scales.global_scale is None:
        return widen(scales.scales)
    by_row = scales.global_scale.ndim == scales.scales.ndim - 1
    return decode_e4m3(scales.scales) * (
        scales.global_scale[..., None] if by_row else scales.global_scale[..., None, None]
    )


def _decode(codes: np.ndarray, format_: Format) -> np.ndarray:
    if format_ is Format.E4M3:
        return decode_e4m3(codes)
    return decode_e2m1(codes) if format_ is Format.E2M1 else codes.astype(np.float32)


def _broadcast(values: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    """Scales with an axis for the elements that share one: ``[..., 1, 1]``, ``[..., out, 1]`` or ``[..., out, blocks, 1]``."""
    return values[..., None, None] if scheme.granularity is Granularity.TENSOR else values[..., None]


def _by_division(
    scheme: WeightScheme, multipliers: np.ndarray, zero_points: np.ndarray | None, shape: Shape
) -> Encoder:
    lead = len(shape) - 2

    def of_chunk(values: np.ndarray, m: int, rows: slice) -> np.ndarray:
        matrix = as_matrices(values, lead)[m]
        return _broadcast(matrix if scheme.granularity is Granularity.TENSOR else matrix[rows], scheme)

    def encode_chunk(chunk: np.ndarray, codes: np.ndarray, m: int, rows: slice, scratch: Scratch) -> None:
        divisors = of_chunk(multipliers, m, rows)
        quotients = widen(chunk, scratch).reshape(*divisors.shape[:-1], -1)
        np.divide(quotients, divisors, out=quotients)
        if zero_points is not None:
            np.rint(quotients, out=quotients)  # before the zero point is added, as ONNX has it
            quotients += of_chunk(zero_points, m, rows).astype(np.float32)
        _encode(quotients.reshape(chunk.shape), codes, scheme.format)

    return encode_chunk


def _by_table(dtype: np.dtype, scheme: WeightScheme, multipliers: np.ndarray) -> Encoder:
    """With one scale, 16-bit floats are few different numbers: each is encoded once and looked up from then on, several times
    as fast."""
    every = widen(np.arange(_TABLE, dtype=np.uint16).view(dtype))
    every[~np.isfinite(every)] = 0
    tables = np.empty((len(multipliers), _TABLE), scheme.format.dtype)
    with np.errstate(over="ignore"):
        for table, multiplier in zip(tables, multipliers, strict=True):
            _encode(every / multiplier, table, scheme.format)

    def encode_chunk(chunk: np.ndarray, codes: np.ndarray, m: int, rows: slice, scratch: Scratch) -> None:
        np.take(tables[m].view(np.uint8), chunk.view(np.uint16), out=codes.view(np.uint8), mode="clip")

    return encode_chunk


def _encode(quotients: np.ndarray, codes: np.ndarray, format_: Format) -> None:
    if format_ is Format.E4M3:
        codes[...] = encode_e4m3(quotients)
    elif format_ is Format.E2M1:
        codes[...] = encode_e2m1(quotients)
    else:
        encode_integer(quotients, codes, *format_.range)
