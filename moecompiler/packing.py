"""Weights from recipes into files: each file whole, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from moecompiler.safetensors_file import write
from moecompiler.weights import Recipe, Shape, TensorReader, materialize


def tensors_of(recipes: Mapping[str, Recipe]) -> dict[str, tuple[str, Shape]]:
    """Dtype and shape of each tensor, in the order in which a file is asked to hold them."""
    return {name: (recipe.dtype, recipe.shape) for name, recipe in sorted(recipes.items())}


def pack(
    parts: Sequence[tuple[Path, Mapping[str, Recipe]]],
    reader: TensorReader,
    progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Writes a safetensors file for each part; ``progress`` is told the fraction of all of them that is done.

    Raises: UserError where a file cannot be written; OverflowError where a weight does not fit its dtype.
    """
    total = max(1, sum(recipe.nbytes for _, recipes in parts for recipe in recipes.values()))
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        progress(min(1.0, written / total))  # headers come on top of the weights

    for path, recipes in parts:
        write(path, tensors_of(recipes), partial(_tensor, recipes, reader), advance)


def _tensor(recipes: Mapping[str, Recipe], reader: TensorReader, name: str) -> np.ndarray:
    return materialize(recipes[name], reader)
