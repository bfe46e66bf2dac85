"""Weights for tests, from memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moecompiler.weights import Shape


class ArrayReader:
    """A ``TensorReader`` over arrays; ``reads`` lists the boxes that were read, as name and shape."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = arrays
        self.reads: list[tuple[str, Shape]] = []

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        self.reads.append((name, shape))
        box = self.arrays[name][tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        assert box.shape == tuple(shape), f"{name} {self.arrays[name].shape} has no box {shape} at {start}"
        return box
