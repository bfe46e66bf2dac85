"""Weights by reference: what a tensor of a rank is made of, without reading it.

A ``Recipe`` describes one tensor as boxes cut out of checkpoint tensors, or as what quantizing such a tensor makes of it. Recipes
are data: they can be sliced, transposed, joined and written to JSON, so a graph can be exported and rewritten without a byte of
its weights in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from moecompiler.quantization.as_json import scheme_from_json, scheme_to_json
from moecompiler.quantization.schemes import WeightScheme

Shape = tuple[int, ...]

FLOATS = ("float32", "float16", "bfloat16")  # what graphs compute in
# of arrays in memory: int4 has a byte for each number there, and is packed where it is stored
NUMPY_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


class TensorReader(Protocol):
    """Where recipes find their sources."""

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        """The box of ``shape`` at ``start`` of tensor ``name``, in its stored dtype; nothing else is read."""


class _NoWeights:
    """For programs without weights of their own."""

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        raise ValueError(f"{name} is wanted where no weights are")


NO_WEIGHTS: TensorReader = _NoWeights()


@runtime_checkable
class IntoReader(TensorReader, Protocol):
    """Where boxes can be read to where they are wanted."""

    def read_into(self, name: str, start: Shape, shape: Shape, out: np.ndarray) -> bool:
        """As ``read``, into ``out``, C-contiguous; False, and nothing is read, where it is of another dtype than the tensor, or
        ``read`` is as good."""


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


class Part(StrEnum):
    """What a quantized weight consists of, in the order in which it is asked for; ``GLOBAL_SCALES``: NVFP4's, one for each row;
    ``POSITIONS``: where in a row of codes each input feature stands, for act-order; ``WEIGHT`` is the numbers it stands for."""

    CODES = "codes"
    SCALES = "scales"
    GLOBAL_SCALES = "global_scales"
    ZERO_POINTS = "zero_points"
    POSITIONS = "positions"
    WEIGHT = "weight"


@dataclass(frozen=True)
class Quantized:
    """A part of what ``scheme`` makes of ``source`` ``[..., out, in]``, a recipe of boxes; scales are of the source's dtype.
    NVFP4's codes ``[..., out, in / 2]``, two to a byte, and its scales, the bits of E4M3, are int8.
    Where the checkpoint holds such codes itself, they are taken as they are.

    A ``WEIGHT`` may be of a wider dtype than its scales: it is rounded to that alone. ``perm``: its axes are permuted so at the
    end; empty leaves them.
    """

    source: Recipe
    scheme: WeightScheme
    part: Part
    perm: Shape = ()

    def to_json(self) -> dict[str, Any]:
        data = {"source": self.source.to_json(), "scheme": scheme_to_json(self.scheme), "part": self.part}
        return data | ({"perm": list(self.perm)} if self.perm else {})

    @staticmethod
    def from_json(data: dict[str, Any]) -> Quantized:
        source, scheme = Recipe.from_json(data["source"]), scheme_from_json(data["scheme"])
        return Quantized(source, scheme, Part(data["part"]), tuple(data.get("perm", ())))


@dataclass(frozen=True)
class Recipe:
    """A tensor of ``dtype`` and ``shape``: zeros, with ``pieces`` put in; or, small and given outright, ``values``; or a part of
    a weight that is ``quantized``, in its own shape or another of as many elements."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...] = ()
    values: tuple[int | float, ...] | None = None
    quantized: Quantized | None = None

    @property
    def is_boxes(self) -> bool:
        """Whether it is made of boxes alone: such recipes can be joined, and quantized."""
        return self.values is None and self.quantized is None

    @property
    def nbytes(self) -> int:
        """In a file. Two of int4 share a byte."""
        count = prod(self.shape)
        return (count + 1) // 2 if self.dtype == "int4" else count * NUMPY_DTYPES[self.dtype].itemsize

    @property
    def sources(self) -> frozenset[str]:
        """The tensors it is made of, directly or by quantizing."""
        boxes = self.quantized.source if self.quantized else self
        return frozenset(piece.source for piece in boxes.pieces)

    def transposed(self, perm: Shape) -> Recipe:
        """The same tensor with its axes permuted: axis i of the result is axis ``perm[i]``."""
        if not self.is_boxes:
            raise ValueError("literal and quantized recipes are not transposed by reference")
        pieces = tuple(
            Piece(p.source, p.start, p.shape, tuple(p.at[i] for i in perm), tuple(p.perm[i] for i in perm))
            for p in self.pieces
        )
        return Recipe(self.dtype, tuple(self.shape[i] for i in perm), pieces)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        if self.values is not None:
            return data | {"values": list(self.values)}
        if self.quantized is not None:
            return data | {"quantized": self.quantized.to_json()}
        return data | {"pieces": [[p.source, p.start, p.shape, p.at, p.perm] for p in self.pieces]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recipe:
        shape = tuple(data["shape"])
        if "values" in data:
            return Recipe(data["dtype"], shape, values=tuple(data["values"]))
        if "quantized" in data:
            return Recipe(data["dtype"], shape, quantized=Quantized.from_json(data["quantized"]))
        pieces = tuple(Piece(source, *map(tuple, boxes)) for source, *boxes in data["pieces"])
        return Recipe(data["dtype"], shape, pieces)


def whole(source: str, dtype: str, shape: Shape) -> Recipe:
    """All of a source tensor, as it is."""
    zeros = (0,) * len(shape)
    return Recipe(dtype, shape, (Piece(source, zeros, shape, zeros, tuple(range(len(shape)))),))


def joined(recipes: Sequence[Recipe], axis: int) -> Recipe:
    """The tensors one after another along ``axis``. Raises: ValueError where they do not fit together."""
    first = recipes[0]
    others = {(r.dtype, r.shape[:axis], r.shape[axis + 1 :], r.is_boxes) for r in recipes}
    if len(others) != 1 or not first.is_boxes:
        raise ValueError("recipes to be joined differ in dtype or in another axis, or are not made of boxes")
    pieces, at = [], 0
    for recipe in recipes:
        for piece in recipe.pieces:
            moved = (*piece.at[:axis], piece.at[axis] + at, *piece.at[axis + 1 :])
            pieces.append(Piece(piece.source, piece.start, piece.shape, moved, piece.perm))
        at += recipe.shape[axis]
    return Recipe(first.dtype, (*first.shape[:axis], at, *first.shape[axis + 1 :]), tuple(pieces))


def materialize(recipe: Recipe, reader: TensorReader, out: np.ndarray | None = None) -> np.ndarray:
    """The tensor itself, C-contiguous and of ``recipe.shape`` and dtype: ``out``, which is such an array, or a new one.
    ``materializing`` makes what is quantized too.

    Raises: OverflowError where a finite weight does not fit the recipe's dtype (a bfloat16 weight beyond float16's 65504).
    """
    dtype = NUMPY_DTYPES[recipe.dtype]
    if recipe.values is not None:
        return np.array(recipe.values, dtype).reshape(recipe.shape)
    if recipe.quantized is not None:
        raise ValueError("a recipe of boxes or a literal is wanted here")
    covered = sum(prod(p.extent) for p in recipe.pieces)
    out = np.empty(recipe.shape, dtype) if out is None else out
    if covered != prod(recipe.shape):
        out[...] = np.zeros((), dtype)
    for piece in recipe.pieces:
        target = out[tuple(slice(a, a + n) for a, n in zip(piece.at, piece.extent, strict=True))]
        if not _read_straight(piece, reader, target):
            _copy(piece, reader, target)
    return out


def _read_straight(piece: Piece, reader: TensorReader, target: np.ndarray) -> bool:
    """Whether a box was read to where it goes, without a copy of it in between."""
    as_it_is = piece.perm == tuple(range(len(piece.at))) and target.flags.c_contiguous
    if not as_it_is or not isinstance(reader, IntoReader):
        return False
    return reader.read_into(piece.source, piece.start, piece.shape, target.reshape(piece.shape))


def _copy(piece: Piece, reader: TensorReader, target: np.ndarray) -> None:
    box = reader.read(piece.source, piece.start, piece.shape)
    box = box.reshape((1,) * (len(piece.at) - len(piece.shape)) + piece.shape).transpose(piece.perm)
    with np.errstate(over="ignore"):
        target[...] = box
    narrower = target.dtype == np.float16 and box.dtype != target.dtype
    if narrower and not np.isfinite(target).all() and np.isfinite(box).all():
        raise OverflowError(f"{piece.source}: holds values beyond float16's range; use --dtype bfloat16")
