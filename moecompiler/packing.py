"""Weights from recipes into files: each file whole, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from moecompiler.materializing import Materializer
from moecompiler.quantization.packing import pack_bytes
from moecompiler.safetensors_file import write
from moecompiler.weights import Recipe, Shape, TensorReader


def tensors_of(recipes: Mapping[str, Recipe]) -> dict[str, tuple[str, Shape]]:
    """Dtype and shape of each tensor as it is stored, in the order in which a file is asked to hold them.

    Safetensors files have no int4: a tensor of it is there as its bytes, flat.
    """
    stored = ((name, recipe) for name, recipe in sorted(recipes.items()))
    return {n: ("uint8", (r.nbytes,)) if r.dtype == "int4" else (r.dtype, r.shape) for n, r in stored}


def stored(recipe: Recipe, array: np.ndarray) -> np.ndarray:
    """A tensor as a file holds it: int4 in bytes, the first of two numbers in the low half, as ONNX has it."""
    if recipe.dtype != "int4":
        return array
    numbers = array.reshape(-1)
    return pack_bytes(np.pad(numbers, (0, 1)) if array.size % 2 else numbers)


def pack(
    parts: Sequence[tuple[Path, Mapping[str, Recipe]]],
    reader: TensorReader,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[str]:
    """Writes a safetensors file for each part and returns their SHA-256s; ``progress`` is told the fraction of all of them that
    is done.

    Raises: UserError where a file cannot be written, or a weight cannot be quantized; OverflowError where one does not fit its
    dtype.
    """
    total = max(1, sum(recipe.nbytes for _, recipes in parts for recipe in recipes.values()))
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        progress(min(1.0, written / total))  # headers come on top of the weights

    tensors = Materializer(reader)

    def tensor(recipes: Mapping[str, Recipe], name: str) -> np.ndarray:
        return stored(recipes[name], tensors.tensor(recipes[name]))

    return [write(path, tensors_of(recipes), partial(tensor, recipes), advance) for path, recipes in parts]
