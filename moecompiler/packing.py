"""Weights from recipes into files: each file whole, one tensor, or two bands of large ones, in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np

from moecompiler.materializing import Materializer
from moecompiler.quantization.packing import pack_bytes
from moecompiler.safetensors_writing import Outgoing, write_side_by_side
from moecompiler.weights import NUMPY_DTYPES, Piece, Recipe, Shape, TensorReader, materialize

BAND = 16 << 20  # bytes of a large weight that are made at a time


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


def bands(recipe: Recipe, nbytes: int, axis: int = 0) -> Iterator[Recipe]:
    """A tensor of boxes cut into runs of its elements of at most about ``nbytes``, along ``axis`` or, where an index of that is
    more, along the next ones. Where an axis is another of a source's, which then would be read again for every band, it is not
    cut."""
    uncut = recipe.nbytes <= nbytes or axis == len(recipe.shape)
    if uncut or any(piece.perm[axis] != axis for piece in recipe.pieces):
        yield recipe
        return
    rows = recipe.shape[axis]
    each = max(1, nbytes * rows // recipe.nbytes)
    for first in range(0, rows, each):
        count = min(each, rows - first)
        pieces = tuple(cut for piece in recipe.pieces if (cut := _within(piece, axis, first, count)) is not None)
        part = Recipe(recipe.dtype, (*recipe.shape[:axis], count, *recipe.shape[axis + 1 :]), pieces)
        yield from bands(part, nbytes, axis + 1) if count == 1 else (part,)


def _within(piece: Piece, axis: int, first: int, count: int) -> Piece | None:
    """What of a piece lies at ``first`` to ``first + count`` of an axis of its own, counted from the first of them; None:
    nothing."""
    low, high = max(first, piece.at[axis]), min(first + count, piece.at[axis] + piece.extent[axis])
    if low >= high:
        return None
    start, shape = list(piece.start), list(piece.shape)
    inner = axis - (len(piece.at) - len(shape))
    if inner >= 0:  # else the axis is one that the box has not, of size 1
        start[inner] += low - piece.at[axis]
        shape[inner] = high - low
    at = (*piece.at[:axis], low - first, *piece.at[axis + 1 :])
    return Piece(piece.source, tuple(start), tuple(shape), at, piece.perm)


def pack(
    parts: Sequence[tuple[Path, Mapping[str, Recipe]]],
    reader: TensorReader,
    progress: Callable[[float], None] = lambda fraction: None,
    side_by_side: bool = False,
) -> list[str]:
    """Writes a safetensors file for each part and returns their SHA-256s; ``progress`` is told the fraction of all of them that
    is done. ``side_by_side``: parts that take boxes of the same tensors are written at once, so that each page of these is read
    from the disk once.

    Raises: UserError where a file cannot be written, or a weight cannot be quantized; OverflowError where one does not fit its
    dtype.
    """
    total = max(1, sum(recipe.nbytes for _, recipes in parts for recipe in recipes.values()))
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        progress(min(1.0, written / total))  # headers come on top of the weights

    tensors, buffers = Materializer(reader), cycle((_Buffer(), _Buffer()))  # a band is written while the next is made

    def tensor(recipes: Mapping[str, Recipe], name: str) -> np.ndarray | Iterator[np.ndarray]:
        recipe = recipes[name]
        if recipe.is_boxes and recipe.nbytes > BAND:
            return (materialize(band, reader, next(buffers).array(band)) for band in bands(recipe, BAND))
        return stored(recipe, tensors.tensor(recipe))

    files = [Outgoing(path, tensors_of(recipes), partial(tensor, recipes)) for path, recipes in parts]
    if side_by_side:
        return write_side_by_side(files, advance)
    return [digest for each in files for digest in write_side_by_side([each], advance)]


class _Buffer:
    """Memory for one band after another: the system clears what it gives anew."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def array(self, recipe: Recipe) -> np.ndarray:
        if self._bytes.nbytes < recipe.nbytes:
            self._bytes = np.empty(recipe.nbytes, np.uint8)
        return self._bytes[: recipe.nbytes].view(NUMPY_DTYPES[recipe.dtype]).reshape(recipe.shape)
