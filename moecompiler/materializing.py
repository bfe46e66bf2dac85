"""Tensors from recipes, quantized ones too."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

from moecompiler.held_codes import held_codes
from moecompiler.quantization.arithmetic import dequantize
from moecompiler.quantization.packing import less_eight, pack_bytes
from moecompiler.quantization.schemes import Format, WeightScheme
from moecompiler.quantizing import quantize_boxes
from moecompiler.weights import NUMPY_DTYPES, Part, Quantized, Recipe, Shape, TensorReader, materialize


class Materializer:
    """Makes tensors from what ``reader`` reads.

    The parts of a quantized weight are asked for one after another: what is left of the last one is kept, so that a weight is
    read and quantized once. At most one float weight and one quantized one are in memory. Threads may share it.
    """

    def __init__(self, reader: TensorReader):
        self._reader = reader
        self._last: tuple[Recipe, WeightScheme] | None = None
        self._parts: dict[Part, np.ndarray] = {}
        self._lock = threading.Lock()

    def tensor(self, recipe: Recipe) -> np.ndarray:
        """A C-contiguous array of ``recipe.shape`` and dtype, nobody else's.

        Raises: OverflowError where a finite weight does not fit the recipe's dtype; UserError where a weight to be quantized
        holds NaN or infinity, or blocks do not divide its input features.
        """
        if recipe.quantized is None:
            return materialize(recipe, self._reader)
        with self._lock:
            array = self._part(recipe.quantized, recipe.dtype)
        if array.dtype != NUMPY_DTYPES[recipe.dtype]:
            raise ValueError(f"{recipe.quantized.part} of {recipe.quantized.scheme} are not {recipe.dtype}")
        return array.reshape(recipe.shape)

    def _part(self, quantized: Quantized, dtype: str) -> np.ndarray:
        key = quantized.source, quantized.scheme
        if key != self._last or quantized.part not in self._parts:
            self._last, self._parts = None, {}
            self._parts = _parts_of(quantized, dtype, self._reader)
            self._last = key
        return self._parts.pop(quantized.part)


def _parts_of(quantized: Quantized, dtype: str, reader: TensorReader) -> dict[Part, np.ndarray]:
    """All parts of a quantized weight; where its numbers are wanted, those alone, in ``dtype``.

    TensorRT knows no unsigned codes: those with zero points are stored less 8, and so are the zero points, which changes no
    difference of the two.
    """
    scheme = quantized.scheme
    made = held_codes(quantized.source, scheme, reader) or quantize_boxes(quantized.source, scheme, reader)
    if quantized.part is Part.WEIGHT:
        wide = made if scheme.two_level else replace(made, scales=made.scales.astype(NUMPY_DTYPES[dtype]))
        numbers = dequantize(wide, dtype)
        return {Part.WEIGHT: np.ascontiguousarray(numbers.transpose(quantized.perm or range(numbers.ndim)))}
    if made.global_scale is not None:
        return {
            Part.CODES: pack_bytes(made.codes).view(np.int8),
            Part.SCALES: made.scales.view(np.int8),
            Part.GLOBAL_SCALES: _by_row(made.global_scale, made.shape),
        }
    unsigned = scheme.format is Format.UINT4
    parts = {Part.CODES: less_eight(made.codes) if unsigned else made.codes, Part.SCALES: made.scales}
    if made.zero_points is not None:
        parts[Part.ZERO_POINTS] = less_eight(made.zero_points)
    if made.order is not None:
        parts[Part.POSITIONS] = np.argsort(made.order, axis=-1)
    return parts


def _by_row(global_scale: np.ndarray, shape: Shape) -> np.ndarray:
    """Of matrices ``[...]`` or of rows ``[..., out]``, as ``[..., out]``."""
    of_matrices = global_scale.ndim < len(shape) - 1
    return np.array(np.broadcast_to(global_scale[..., None] if of_matrices else global_scale, shape[:-1]))
