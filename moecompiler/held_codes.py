"""Weights that a checkpoint holds as codes, put together as a recipe's boxes say; nothing is quantized anew."""

from __future__ import annotations

from math import prod
from typing import Protocol, runtime_checkable

import numpy as np

from moecompiler.errors import UserError
from moecompiler.quantization.encodings import E4M3
from moecompiler.quantization.schemes import Granularity, QuantizedTensor, WeightScheme
from moecompiler.weights import NUMPY_DTYPES, Piece, Recipe, Shape, TensorReader


@runtime_checkable
class CodesReader(TensorReader, Protocol):
    """Where recipes find their sources as codes."""

    def scheme(self, name: str) -> WeightScheme | None:
        """How the codes of tensor ``name`` are made; None where it is held as floats."""

    def read_codes(self, name: str, start: Shape, shape: Shape) -> QuantizedTensor:
        """The codes of the box of ``shape`` at ``start``, of whole groups, and what goes with them; nothing else is read."""


def held_codes(source: Recipe, scheme: WeightScheme, reader: TensorReader) -> QuantizedTensor | None:
    """The weight ``source`` ``[..., out, in]``, a recipe of boxes, in the codes that the checkpoint holds, with scales in the
    source's dtype; None where it holds floats. Of each matrix ``[out, in]`` all rows have their features in one order.

    Raises: UserError where it holds other codes than ``scheme``'s, or matrices are of rows that have their features in different
    orders; OverflowError where a scale does not fit the dtype.
    """
    held = {name: reader.scheme(name) for name in sorted(source.sources)} if isinstance(reader, CodesReader) else {}
    if not any(held.values()):
        return None
    assert isinstance(reader, CodesReader)
    for name, has in held.items():
        if has != scheme:
            raise UserError(f"{name}: is {has or 'not quantized'} in the checkpoint, and {scheme} is wanted")
    if sum(prod(piece.extent) for piece in source.pieces) != prod(source.shape):
        raise ValueError("boxes of codes do not fill the weight")
    # a scale per matrix becomes one for each of its rows: the weight may be of rows of several
    by_row = scheme.granularity is Granularity.TENSOR
    made_scheme = WeightScheme(scheme.format, Granularity.CHANNEL) if by_row else scheme
    lead, scales_shape = source.shape[:-2], made_scheme.scale_shape(source.shape)
    made = QuantizedTensor(
        made_scheme,
        np.empty(source.shape, scheme.format.dtype),
        np.empty(scales_shape, E4M3 if scheme.two_level else NUMPY_DTYPES[source.dtype]),
        None if scheme.symmetric else np.empty(scales_shape, np.uint8),
        np.empty(source.shape[:-1], np.float32) if scheme.two_level else None,
        np.full((*lead, source.shape[-1]), -1, np.int64) if scheme.act_order else None,
    )
    for piece in source.pieces:
        _put(made, piece, reader.read_codes(piece.source, piece.start, piece.shape))
    return made


def _put(made: QuantizedTensor, piece: Piece, part: QuantizedTensor) -> None:
    """A box's codes where they belong."""
    if piece.perm != tuple(range(len(piece.at))):
        raise ValueError(f"{piece.source}: codes are not transposed")
    *lead, row, column = piece.at
    rows, columns = slice(row, row + part.shape[0]), slice(column, column + part.shape[1])
    block = made.scheme.block_size
    within: tuple[int | slice, ...] = (*lead, rows)
    if made.global_scale is not None:
        made.global_scale[within] = part.global_scale
    made.codes[(*within, columns)] = part.codes
    if block is not None:
        within = (*within, slice(columns.start // block, columns.stop // block))
    with np.errstate(over="ignore"):
        made.scales[within] = part.scales
    if not np.isfinite(made.scales[within].astype(np.float32)).all():
        raise OverflowError(f"{piece.source}: holds scales beyond {made.scales.dtype}'s range; use --dtype bfloat16")
    if made.zero_points is not None:
        made.zero_points[within] = part.zero_points
    if made.order is not None and part.order is not None:
        order = made.order[tuple(lead)]
        if order[0] >= 0 and not np.array_equal(order, part.order):
            raise UserError(
                f"{piece.source}: has its input features in another order than the weights that it is joined with;"
                " use a checkpoint without act-order"
            )
        order[...] = part.order
