"""Weights from recipes into files: each file whole, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from moecompiler.materializing import Materializer
from moecompiler.quantization.packing import pack_bytes
from moecompiler.safetensors_file import write
from moecompiler.weights import Piece, Recipe, Shape, TensorReader

BAND = 64 << 20  # bytes of a large weight that are made at a time


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


def bands(recipe: Recipe, nbytes: int) -> Iterator[Recipe]:
    """A tensor of boxes cut along its first axis into bands of about ``nbytes``, at least a row each. Where that axis is another
    of a source's, which then would be read again for every band, the tensor is the only band."""
    rows = recipe.shape[0] if recipe.shape else 1
    each = max(1, nbytes * rows // max(1, recipe.nbytes))
    if each >= rows or any(piece.perm[0] != 0 for piece in recipe.pieces):
        yield recipe
        return
    for first in range(0, rows, each):
        count = min(each, rows - first)
        pieces = tuple(cut for piece in recipe.pieces if (cut := _within(piece, first, count)) is not None)
        yield Recipe(recipe.dtype, (count, *recipe.shape[1:]), pieces)


def _within(piece: Piece, first: int, count: int) -> Piece | None:
    """What of a piece lies in rows ``first`` to ``first + count``, counted from the first of them; None: nothing."""
    low, high = max(first, piece.at[0]), min(first + count, piece.at[0] + piece.extent[0])
    if low >= high:
        return None
    start, shape = piece.start, piece.shape
    if len(shape) == len(piece.at):  # else the axis is one that the box has not, of size 1
        start = (start[0] + low - piece.at[0], *start[1:])
        shape = (high - low, *shape[1:])
    return Piece(piece.source, start, shape, (low - first, *piece.at[1:]), piece.perm)


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

    def tensor(recipes: Mapping[str, Recipe], name: str) -> np.ndarray | Iterator[np.ndarray]:
        recipe = recipes[name]
        if recipe.is_boxes and recipe.nbytes > BAND:
            return (tensors.tensor(band) for band in bands(recipe, BAND))
        return stored(recipe, tensors.tensor(recipe))

    return [write(path, tensors_of(recipes), partial(tensor, recipes), advance) for path, recipes in parts]
