"""Boxes of published quantized layers: how each stored tensor's axes go with the weight's, so that a rank reads its share alone.

A box of a packed tensor is the packed tensor of a box, if it begins and ends with whole words and groups. So the layout's reader
reads a box as it reads a layer, and what was read too much is cut off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moecompiler.quantization.arithmetic import dequantize
from moecompiler.quantization.encodings import E4M3
from moecompiler.quantization.packing import WORD
from moecompiler.quantization.published import read_linear
from moecompiler.quantization.published_config import Layout, PublishedConfig
from moecompiler.quantization.published_layouts import FLOATS, INT32, Tensors
from moecompiler.quantization.schemes import Granularity, QuantizedTensor
from moecompiler.quantization.slicing import Axis, cut
from moecompiler.weights import Shape

_GROUP = 0  # in place of a number of features: those that share a scale


@dataclass(frozen=True)
class Stored:
    """A stored tensor: which features each of its axes runs over and how many of them an element holds (no axes: a single
    number), and the dtypes it may have."""

    axes: tuple[tuple[Axis, int], ...]
    dtypes: tuple[np.dtype, ...]


_OUT, _IN, _GROUPS = (Axis.OUT, 1), (Axis.IN, 1), (Axis.IN, _GROUP)
_OUT_WORDS, _IN_WORDS = (Axis.OUT, WORD), (Axis.IN, WORD)
_INTEGERS = (INT32, np.dtype(np.int64))
_NUMBER = Stored((), FLOATS)

_GPTQ = {
    "qweight": Stored((_IN_WORDS, _OUT), (INT32,)),
    "qzeros": Stored((_GROUPS, _OUT_WORDS), (INT32,)),
    "scales": Stored((_GROUPS, _OUT), FLOATS),
    "g_idx": Stored((_IN,), _INTEGERS),
}
_FP8 = {"weight": Stored((_OUT, _IN), (E4M3,)), "weight_scale": Stored((_OUT, _GROUPS), FLOATS), "input_scale": _NUMBER}
_TENSORS: dict[Layout, dict[str, Stored]] = {
    Layout.AWQ: {
        "qweight": Stored((_IN, _OUT_WORDS), (INT32,)),
        "qzeros": Stored((_GROUPS, _OUT_WORDS), (INT32,)),
        "scales": Stored((_GROUPS, _OUT), FLOATS),
    },
    Layout.GPTQ_V1: _GPTQ,
    Layout.GPTQ_V2: _GPTQ,
    Layout.CT_INT4: {
        "weight_packed": Stored((_OUT, _IN_WORDS), (INT32,)),
        "weight_scale": Stored((_OUT, _GROUPS), FLOATS),
        "weight_zero_point": Stored((_OUT_WORDS, _GROUPS), (INT32,)),
        "weight_g_idx": Stored((_IN,), _INTEGERS),
    },
    Layout.CT_FP8: _FP8,
    Layout.MODELOPT_FP8: _FP8,
    Layout.MODELOPT_NVFP4: {
        "weight": Stored((_OUT, (Axis.IN, 2)), (np.dtype(np.uint8),)),
        "weight_scale": Stored((_OUT, _GROUPS), (E4M3,)),
        "weight_scale_2": _NUMBER,
        "input_scale": _NUMBER,
    },
    Layout.CT_NVFP4: {
        "weight_packed": Stored((_OUT, (Axis.IN, 2)), (np.dtype(np.uint8),)),
        "weight_scale": Stored((_OUT, _GROUPS), (E4M3,)),
        "weight_global_scale": _NUMBER,
        "input_global_scale": _NUMBER,
    },
}
_GROUP_INDICES = ("g_idx", "weight_g_idx")


def stored_tensors(config: PublishedConfig) -> dict[str, Stored]:
    """By suffix, the tensors that say what a layer's weight is; some layers have fewer (``published_layouts.tensors_of``)."""
    tensors = _TENSORS[config.layout]
    return tensors | {"weight_scale": _NUMBER} if config.scheme.granularity is Granularity.TENSOR else tensors


def stored_shapes(config: PublishedConfig, stored: Stored, shape: Shape) -> tuple[Shape, ...]:
    """The shapes that a stored tensor of a layer of ``shape`` ``[out, in]`` may have."""
    if not stored.axes:
        return (), (1,)
    return (tuple(_features(shape, axis) // _each(config, axis, count, shape) for axis, count in stored.axes),)


def read_codes(
    config: PublishedConfig, tensors: Tensors, linear: str, shape: Shape, start: Shape, size: Shape
) -> QuantizedTensor:
    """The box of ``size`` at ``start`` of the layer ``linear``, whose weight is of ``shape`` ``[out, in]``.

    Raises: UserError as ``published.read_linear``, and as ``slicing.cut`` where the box is not of whole groups.
    """
    tensor, at = _read_around(config, tensors, linear, shape, start, size)
    if at[0] or tensor.shape[0] != size[0]:
        tensor = cut(tensor, Axis.OUT, at[0], at[0] + size[0], linear)
    if at[1] or tensor.shape[1] != size[1]:
        tensor = cut(tensor, Axis.IN, at[1], at[1] + size[1], linear)
    return tensor


def read_numbers(
    config: PublishedConfig, tensors: Tensors, linear: str, shape: Shape, start: Shape, size: Shape
) -> np.ndarray:
    """The numbers that the box's codes stand for, float32 and not rounded to less; any box. Raises: as ``read_linear``."""
    tensor, at = _read_around(config, tensors, linear, shape, start, size)
    if not tensor.scheme.two_level:  # there scales are codes themselves
        tensor = replace(tensor, scales=tensor.scales.astype(np.float32))
    rows, columns = (slice(first, first + count) for first, count in zip(at, size, strict=True))
    return np.ascontiguousarray(dequantize(tensor, "float32")[rows, columns])


def _read_around(
    config: PublishedConfig, tensors: Tensors, linear: str, shape: Shape, start: Shape, size: Shape
) -> tuple[QuantizedTensor, Shape]:
    """The least box of whole words and groups that holds the one asked for, and where in it that begins. With act-order,
    a group's features are everywhere: it is of whole rows."""
    unit = config.scheme.block_size or WORD
    rows = _widened(start[0], size[0], WORD, shape[0])
    columns = slice(0, shape[1]) if config.act_order else _widened(start[1], size[1], unit, shape[1])
    box = {
        f"{linear}.{suffix}": _box(config, suffix, stored, tensors[f"{linear}.{suffix}"], rows, columns)
        for suffix, stored in stored_tensors(config).items()
        if f"{linear}.{suffix}" in tensors
    }
    weight = read_linear(config, box, linear, (rows.stop - rows.start, columns.stop - columns.start)).weight
    return weight, (start[0] - rows.start, start[1] - columns.start)


def _widened(start: int, size: int, unit: int, end: int) -> slice:
    return slice(start // unit * unit, min(-(-(start + size) // unit) * unit, end))


def _box(
    config: PublishedConfig, suffix: str, stored: Stored, array: np.ndarray, rows: slice, columns: slice
) -> np.ndarray:
    if not stored.axes:
        return array
    cuts = []
    for axis, count in stored.axes:
        along = rows if axis is Axis.OUT else columns
        if count == _GROUP and config.scheme.block_size is None:
            cuts.append(slice(None))  # one scale for a row, whatever is read of it
            continue
        each = count or config.scheme.block_size or 1
        cuts.append(slice(along.start // each, -(-along.stop // each)))
    part = array[tuple(cuts)]
    if suffix in _GROUP_INDICES and config.scheme.block_size is not None:
        return part - part.dtype.type(columns.start // config.scheme.block_size)  # counted from the box's first group
    return part


def _features(shape: Shape, axis: Axis) -> int:
    return shape[0] if axis is Axis.OUT else shape[1]


def _each(config: PublishedConfig, axis: Axis, count: int, shape: Shape) -> int:
    return count or config.scheme.block_size or _features(shape, axis)
