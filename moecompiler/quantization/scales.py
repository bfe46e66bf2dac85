"""The scales of a weight.

A symmetric scale is the largest magnitude over the format's largest number; an asymmetric one is the range, zero included, over
its number of steps, as in ONNX's ``DynamicQuantizeLinear``. Both are rounded to the dtype that they are stored in before
anything is divided by them, and are never 0. NVFP4's are ModelOpt's (``NVFP4QTensor``): the global scale is the largest
magnitude over 6 · 448, a block's is its largest magnitude over 6 and the global scale, in E4M3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moecompiler.quantization.chunks import Scratch, as_matrices, each_chunk
from moecompiler.quantization.encodings import (
    E2M1_MAX,
    E4M3,
    E4M3_MAX,
    E4M3_TINY,
    encode_e4m3,
    encode_integer,
    extreme,
    largest_magnitude,
    widen,
)
from moecompiler.quantization.schemes import Granularity, WeightScheme
from moecompiler.weights import NUMPY_DTYPES


@dataclass(frozen=True, eq=False)
class Scales:
    """What a ``QuantizedTensor`` holds besides its codes."""

    scales: np.ndarray
    zero_points: np.ndarray | None = None
    global_scale: np.ndarray | None = None


def find_scales(weight: np.ndarray, scheme: WeightScheme, scale_dtype: str, threads: int = 1) -> Scales:
    """The scales of ``weight`` ``[..., out, in]``, float16, bfloat16 or float32; in ``scale_dtype``, but for NVFP4.

    Raises: ValueError for NaN or infinity; OverflowError where a scale is beyond ``scale_dtype``; UserError where blocks do not
    divide the input features.
    """
    shape, lead = weight.shape, weight.ndim - 2
    form = scheme.scale_shape(shape)
    if scheme.granularity is Granularity.TENSOR:
        return Scales(positive(_matrix_maxima(weight, threads) / np.float32(scheme.format.largest), scale_dtype))
    global_scale = None
    if scheme.two_level:
        global_scale = positive(_matrix_maxima(weight, threads) / np.float32(E2M1_MAX * E4M3_MAX), "float32")
    found = Scales(
        np.empty(form, E4M3 if scheme.two_level else NUMPY_DTYPES[scale_dtype]),
        None if scheme.symmetric else np.empty(form, np.uint8),
        global_scale,
    )

    matrices, into = as_matrices(weight, lead), as_matrices(found.scales, lead)

    def work(m: int, rows: slice, scratch: Scratch) -> None:
        groups = matrices[m, rows].reshape(*into[m, rows].shape, -1)
        if found.zero_points is not None:
            scales, as_matrices(found.zero_points, lead)[m, rows] = _asymmetric(groups, scheme, scale_dtype, scratch)
        elif global_scale is not None:
            scales = _block_scales(groups, global_scale.reshape(-1)[m], scratch)
        else:
            scales = positive(_maxima(groups, scratch) / np.float32(scheme.format.largest), scale_dtype)
        into[m, rows] = scales

    each_chunk(work, shape, threads)
    return found


def positive(scales: np.ndarray, dtype: str) -> np.ndarray:
    """float32 scales rounded to ``dtype`` and never 0: 1 for what is all zeros, the least number for what is next to it.

    Raises: OverflowError where one is too large for ``dtype``.
    """
    stored = NUMPY_DTYPES[dtype]
    with np.errstate(over="ignore"):
        rounded = np.where(scales == 0, np.float32(1), scales).astype(stored)
    if not np.isfinite(widen(rounded)).all():
        raise OverflowError(f"a scale is beyond {dtype}'s range; use --dtype bfloat16")
    least = np.array(1, f"u{stored.itemsize}").view(stored)
    return np.where(rounded == 0, least, rounded)


def _maxima(groups: np.ndarray, scratch: Scratch) -> np.ndarray:
    """The largest magnitudes along the last axis, float32. Raises: ValueError for NaN or infinity."""
    return _finite(largest_magnitude(groups, scratch))


def _finite(extremes: np.ndarray) -> np.ndarray:
    if not np.isfinite(extremes).all():
        raise ValueError("the weight holds NaN or infinity")
    return extremes


def _matrix_maxima(weight: np.ndarray, threads: int) -> np.ndarray:
    """The largest magnitude of each matrix, ``[...]`` float32."""
    per_row = np.zeros(weight.shape[:-1], np.float32)
    into, matrices = as_matrices(per_row, weight.ndim - 2), as_matrices(weight, weight.ndim - 2)

    def work(m: int, rows: slice, scratch: Scratch) -> None:
        into[m, rows] = _maxima(matrices[m, rows], scratch)

    each_chunk(work, weight.shape, threads)
    return per_row.max(axis=-1, initial=0)


def _asymmetric(
    groups: np.ndarray, scheme: WeightScheme, scale_dtype: str, scratch: Scratch
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points along the last axis. Zero is a code, so that what was exactly zero stays so."""
    wide = widen(groups, scratch)
    low, high = _finite(extreme(np.minimum, wide)), _finite(extreme(np.maximum, wide))
    scales = positive((high - low) / np.float32(scheme.format.largest), scale_dtype)
    zero_points = np.empty(low.shape, np.uint8)
    encode_integer(-low / widen(scales), zero_points, *scheme.format.range)
    return scales, zero_points


def _block_scales(groups: np.ndarray, global_scale: np.float32, scratch: Scratch) -> np.ndarray:
    """NVFP4's, ``float8_e4m3fn``: blocks of zeros get 1, and no scale becomes 0 or NaN."""
    scales = _maxima(groups, scratch) / (np.float32(E2M1_MAX) * global_scale)
    return encode_e4m3(
        np.clip(np.where(scales == 0, np.float32(1), scales), np.float32(E4M3_TINY), np.float32(E4M3_MAX))
    )
