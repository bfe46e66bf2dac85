"""A checkpoint whose experts have more features than they have."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from moecompiler.clipping import ClippingReader
from moecompiler.errors import UserError
from moecompiler.held_codes import CodesReader
from moecompiler.weights import Shape, TensorReader

_EXPERT = re.compile(r".*\.(w[123])\.weight")


class PaddedReader:
    """Gives zeros beyond ``hidden`` features of experts' weights, where a recipe asks for more (``forced.padded``); all else is
    the reader's own. Rows keep the scales that they have without.

    Raises: UserError where the checkpoint holds codes, or scales that were searched for: those are of its own sizes.
    """

    def __init__(self, reader: TensorReader, hidden: int):
        if isinstance(reader, CodesReader | ClippingReader):
            raise UserError(
                "routing cannot be replayed: the checkpoint holds codes or scales that are for its own features alone"
            )
        self._reader, self._hidden = reader, hidden

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        """See ``TensorReader``."""
        found = _EXPERT.fullmatch(name)
        axis = 0 if found is not None and found[1] == "w2" else 1
        if found is None or start[axis] + shape[axis] <= self._hidden:
            return self._reader.read(name, start, shape)
        there = list(shape)
        there[axis] = self._hidden - start[axis]
        if there[axis] <= 0:
            kind = self._reader.read(name, (0,) * len(shape), (1,) * len(shape)).dtype
            return np.zeros(shape, kind)
        box = self._reader.read(name, start, tuple(there))
        widths: Any = [(0, whole - part) for whole, part in zip(shape, there, strict=True)]
        return np.pad(box, widths)
