"""Groups of weights that are clipped when they are quantized: their scales are of less than their largest magnitudes, which
saturate."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from moecompiler.quantization.encodings import widen
from moecompiler.quantization.scales import Scales, positive
from moecompiler.quantization.schemes import WeightScheme
from moecompiler.weights import Recipe, Shape, TensorReader


@runtime_checkable
class ClippingReader(TensorReader, Protocol):
    """Where recipes find their sources, and how groups of them are best clipped."""

    def clipping(self, name: str, start: Shape, shape: Shape, block: int) -> np.ndarray | None:
        """What the largest magnitudes of the groups of ``block`` in a box are multiplied by, float32 ``[out, groups]``; None: by
        1."""


def clipping_of(source: Recipe, scheme: WeightScheme, reader: TensorReader) -> np.ndarray | None:
    """Float32 ``[..., out, groups]`` for the weight ``source`` ``[..., out, in]``; None where nothing is clipped. Only
    integers in groups are.

    Raises: UserError as ``ClippingReader.clipping``.
    """
    block = scheme.block_size
    if not isinstance(reader, ClippingReader) or block is None or scheme.two_level:
        return None
    ratios = np.ones(scheme.scale_shape(source.shape), np.float32)
    for piece in source.pieces:
        found = reader.clipping(piece.source, piece.start, piece.shape, block)
        if found is not None:
            *lead, row, column = piece.at
            groups = slice(column // block, column // block + found.shape[1])
            where: tuple[int | slice, ...] = (*lead, slice(row, row + found.shape[0]), groups)
            ratios[where] = found
    return None if (ratios == 1).all() else ratios


def clipped(scales: Scales, ratios: np.ndarray, dtype: str) -> Scales:
    """Scales in ``dtype``, by ``ratios``; zero points stay where they are. Raises: OverflowError as ``scales.positive``."""
    return replace(scales, scales=positive(widen(scales.scales) * ratios, dtype))
