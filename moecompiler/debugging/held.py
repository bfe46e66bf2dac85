"""What a graph holds beside its nodes: weights, by recipe or as data in a file, and constants."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from moecompiler.foreign import external_place, name_after_modules, notes_modules
from moecompiler.graph import Program, load_program
from moecompiler.graph_text import is_written_out, tensor_type
from moecompiler.weights import Recipe

_CHUNK = 16 << 20  # bytes compared at a time


@dataclass(frozen=True)
class Side:
    """A graph to be compared; ``folder`` is where its external data lie."""

    program: Program
    folder: Path

    @staticmethod
    def read(path: Path) -> Side:
        """Any ONNX file, of whatever opset; its nodes named after the HF modules that an exporter noted.

        Raises: UserError where it is none.
        """
        program = load_program(path)
        if notes_modules(program.model.graph.node):
            name_after_modules(program.model.graph.node)
        return Side(program, path.parent)


@dataclass(frozen=True)
class Held:
    """An initializer: a weight by ``recipe``, or ``tensor`` with its data, which may be in a file of ``folder``."""

    tensor: TensorProto
    recipe: Recipe | None
    folder: Path

    @property
    def type(self) -> str:
        return tensor_type(self.tensor)

    @property
    def is_large(self) -> bool:
        """Whether it goes by its name: what is small is written out where it is read."""
        return self.recipe is not None or not is_written_out(self.tensor)

    def same_as(self, other: Held) -> bool | None:
        """Whether both are the same; None where that cannot be told without reading a checkpoint, or data are missing."""
        if self.type != other.type:
            return False
        if self.recipe is not None and other.recipe is not None:
            return self.recipe == other.recipe
        if self.recipe is not None or other.recipe is not None:
            return None
        mine, theirs = self._bytes(), other._bytes()
        if mine is None or theirs is None:
            return None
        return len(mine) == len(theirs) and all(
            np.array_equal(mine[at : at + _CHUNK], theirs[at : at + _CHUNK]) for at in range(0, len(mine), _CHUNK)
        )

    def described(self, other: Held) -> str:
        """Its type, and if that is the other's too, a mark of what tells them apart."""
        if self.type != other.type:
            return self.type
        if self.recipe is not None and other.recipe is not None:
            return f"{self.type} of {_pieces(self.recipe, other.recipe)}"
        data = self._bytes()
        return f"{self.type} of data {digest(data.tobytes())}" if data is not None else self.type

    def made_of(self, others: Mapping[Recipe, str]) -> str:
        """`` = NAME transposed [1, 0]`` where its recipe is that of one of the others with its axes permuted."""
        if self.recipe is None or not self.recipe.is_boxes or not self.recipe.pieces:
            return ""
        if same := others.get(self.recipe):
            return f" = {same}"
        # the permutations that make a weight of a checkpoint's layout: of the last two axes
        rank = len(self.recipe.shape)
        if rank < 2:
            return ""
        perm = (*range(rank - 2), rank - 1, rank - 2)
        source = others.get(self.recipe.transposed(perm))
        return f" = {source} transposed {list(perm)}" if source else ""

    def _bytes(self) -> np.ndarray | None:
        """Its data, flat, mapped from their file; None where that is missing or too short."""
        if self.tensor.data_location != TensorProto.EXTERNAL:
            return np.ascontiguousarray(numpy_helper.to_array(self.tensor)).reshape(-1).view(np.uint8)
        location, offset, length = external_place(self.tensor)
        itemsize = helper.tensor_dtype_to_np_dtype(self.tensor.data_type).itemsize
        size = math.prod(self.tensor.dims) * itemsize if length is None else length
        path = self.folder / location
        if not path.is_file() or path.stat().st_size < offset + size:
            return None
        return np.memmap(path, np.uint8, "r", offset, (size,)) if size else np.zeros(0, np.uint8)


def held_by(side: Side) -> dict[str, Held]:
    """Every initializer by its name."""
    recipes = side.program.weights
    return {each.name: Held(each, recipes.get(each.name), side.folder) for each in side.program.model.graph.initializer}


def digest(data: bytes) -> str:
    """Enough of the SHA-256 to tell contents apart by eye."""
    return f"sha256 {hashlib.sha256(data).hexdigest()[:12]}"


def _pieces(recipe: Recipe, other: Recipe) -> str:
    """What a recipe is made of: of several pieces the first that is not the other's."""
    if recipe.values is not None:
        return f"values {list(recipe.values)}"
    if recipe.quantized is not None:
        theirs = other.quantized.source if other.quantized is not None else other
        return f"{recipe.quantized.part}, {recipe.quantized.scheme}, of {_pieces(recipe.quantized.source, theirs)}"
    pairs = zip_longest(recipe.pieces, other.pieces)
    at = next((index for index, (mine, theirs) in enumerate(pairs) if mine != theirs), 0)
    many = f"{len(recipe.pieces)} pieces" if len(recipe.pieces) != 1 else ""
    if at >= len(recipe.pieces):
        return many
    piece = recipe.pieces[at]
    box = ", ".join(f"{start}:{start + size}" for start, size in zip(piece.start, piece.shape, strict=True))
    turned = f" transposed {list(piece.perm)}" if list(piece.perm) != sorted(piece.perm) else ""
    placed = f" put at {list(piece.at)}" if any(piece.at) else ""
    return f"{many}{f', number {at + 1}: ' if many else ''}{piece.source}[{box}]{turned}{placed}"
