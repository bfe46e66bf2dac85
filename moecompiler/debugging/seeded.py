"""Random weights in place of a checkpoint's, for graphs whose weights are too large to be handed on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moecompiler.uniform import fill_uniform, key_of
from moecompiler.weights import NUMPY_DTYPES, Shape

_DEVIATION = 0.05


class SeededReader:
    """Reads any box of any tensor: values by name and index, vectors around 1 and all else around 0; see
    ``weights.TensorReader``. ``dtypes``: the stored dtype of tensors by name (float32, if not there)."""

    def __init__(self, dtypes: Mapping[str, str] | None = None):
        self._dtypes = dict(dtypes or {})

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        """A new array."""
        out = np.empty(shape, NUMPY_DTYPES[self._dtypes.get(name, "float32")])
        if len(shape) == 1:
            fill_uniform(out[None], key_of(name), (0, *start), 1.0, _DEVIATION)
            return out
        for index in np.ndindex(shape[:-2]):
            place = tuple(a + i for a, i in zip(start, index, strict=False))
            fill_uniform(out[index], key_of(f"{name} {place}"), start[-2:], 0.0, _DEVIATION)
        return out
