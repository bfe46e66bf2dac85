"""Weights by reference: what a tensor of a rank is made of, without reading it.

A ``Recipe`` describes one tensor as boxes cut out of checkpoint tensors. Recipes are data: they can be sliced, transposed,
joined and written to JSON, so a graph can be exported and rewritten without a byte of its weights in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]

NUMPY_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
}


class TensorReader(Protocol):
    """Where recipes find their sources."""

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        """The box of ``shape`` at ``start`` of tensor ``name``, in its stored dtype; nothing else is read."""


@dataclass(frozen=True)
class Piece:
    """A box of a source tensor and where it goes.

    The box ``source[start : start + shape]``, given leading axes of size 1 up to the destination's rank and then transposed
    by ``perm`` (destination axis i is axis ``perm[i]`` of the box), fills the destination from ``at`` on.
    """

    source: str
    start: Shape
    shape: Shape
    at: Shape
    perm: Shape

    @property
    def extent(self) -> Shape:
        """The shape it fills in the destination."""
        padded = (1,) * (len(self.at) - len(self.shape)) + self.shape
        return tuple(padded[axis] for axis in self.perm)


@dataclass(frozen=True)
class Recipe:
    """A tensor of ``dtype`` and ``shape``: zeros, with ``pieces`` put in; or, small and given outright, ``values``."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...] = ()
    values: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * NUMPY_DTYPES[self.dtype].itemsize

    def transposed(self, perm: Shape) -> Recipe:
        """The same tensor with its axes permuted: axis i of the result is axis ``perm[i]``."""
        if self.values is not None:
            raise ValueError("a literal recipe has nothing to transpose by reference")
        pieces = tuple(
            Piece(p.source, p.start, p.shape, tuple(p.at[i] for i in perm), tuple(p.perm[i] for i in perm))
            for p in self.pieces
        )
        return Recipe(self.dtype, tuple(self.shape[i] for i in perm), pieces)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        if self.values is not None:
            return data | {"values": list(self.values)}
        return data | {"pieces": [[p.source, p.start, p.shape, p.at, p.perm] for p in self.pieces]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recipe:
        shape = tuple(data["shape"])
        if "values" in data:
            return Recipe(data["dtype"], shape, values=tuple(data["values"]))
        pieces = tuple(Piece(source, *map(tuple, boxes)) for source, *boxes in data["pieces"])
        return Recipe(data["dtype"], shape, pieces)


def whole(source: str, dtype: str, shape: Shape) -> Recipe:
    """All of a source tensor, as it is."""
    zeros = (0,) * len(shape)
    return Recipe(dtype, shape, (Piece(source, zeros, shape, zeros, tuple(range(len(shape)))),))


def joined(recipes: Sequence[Recipe], axis: int) -> Recipe:
    """The tensors one after another along ``axis``. Raises: ValueError where they do not fit together."""
    first = recipes[0]
    others = {(r.dtype, r.shape[:axis], r.shape[axis + 1 :], r.values is None) for r in recipes}
    if len(others) != 1 or first.values is not None:
        raise ValueError("recipes to be joined differ in dtype or in another axis, or are literals")
    pieces, at = [], 0
    for recipe in recipes:
        for piece in recipe.pieces:
            moved = (*piece.at[:axis], piece.at[axis] + at, *piece.at[axis + 1 :])
            pieces.append(Piece(piece.source, piece.start, piece.shape, moved, piece.perm))
        at += recipe.shape[axis]
    return Recipe(first.dtype, (*first.shape[:axis], at, *first.shape[axis + 1 :]), tuple(pieces))


def materialize(recipe: Recipe, reader: TensorReader) -> np.ndarray:
    """The tensor itself, a new C-contiguous array of ``recipe.shape`` and dtype.

    Raises: OverflowError where a finite weight does not fit the recipe's dtype (a bfloat16 weight beyond float16's 65504).
    """
    dtype = NUMPY_DTYPES[recipe.dtype]
    if recipe.values is not None:
        return np.array(recipe.values, dtype).reshape(recipe.shape)
    covered = sum(int(np.prod(p.extent, dtype=np.int64)) for p in recipe.pieces)
    whole = covered == int(np.prod(recipe.shape, dtype=np.int64))
    out = np.empty(recipe.shape, dtype) if whole else np.zeros(recipe.shape, dtype)
    for piece in recipe.pieces:
        box = reader.read(piece.source, piece.start, piece.shape)
        box = box.reshape((1,) * (len(piece.at) - len(piece.shape)) + piece.shape).transpose(piece.perm)
        target = out[tuple(slice(a, a + n) for a, n in zip(piece.at, piece.extent, strict=True))]
        with np.errstate(over="ignore"):
            target[...] = box
        if dtype == np.float16 and box.dtype != dtype and not np.isfinite(target).all() and np.isfinite(box).all():
            raise OverflowError(f"{piece.source}: holds values beyond float16's range; use --dtype bfloat16")
    return out
