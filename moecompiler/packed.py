"""A rank's own copy of its weights: one file beside its graph, so that the checkpoint is not needed where the rank is built.

The file is the safetensors file that an exported graph points into (``graph.serialize``): tensors as the graph wants them,
sliced, joined and of its dtype, each from a multiple of 64 bytes on, the first from a page on. So the graph runs as it is, and
the file can be mapped and streamed. Recipes stay what they were, boxes of the checkpoint: ``PackedWeights`` finds each box in
the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moecompiler.atomic import FileRecord, Staged, check_files, sync
from moecompiler.checkpoint import Source
from moecompiler.config import ModelConfig
from moecompiler.dummy import open_source
from moecompiler.errors import UserError
from moecompiler.packing import pack
from moecompiler.safetensors_file import StoredTensor, map_tensor, read_header
from moecompiler.weights import Piece, Recipe, Shape, TensorReader

PACKED = "packed"  # of a rank's information: where the file is, from the artifact's directory, and what it must be


def write_packed(
    parts: Mapping[int, tuple[Path, Mapping[str, Recipe]]], reader: TensorReader, progress: Callable[[float], None]
) -> dict[int, Staged]:
    """Writes the weights of ranks to their paths, temporary names, side by side: of ranks that share tensors, each page of these
    is read once. Two bands are in memory at a time.

    Raises: UserError where a file cannot be written, or a weight does not fit its dtype.
    """
    path = Path()
    try:
        digests = pack(list(parts.values()), reader, progress, side_by_side=True)
        for path, _ in parts.values():
            sync(path)
    except OverflowError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from None
    return {
        rank: Staged(path, FileRecord(path.stat().st_size, digest))
        for (rank, (path, _)), digest in zip(parts.items(), digests, strict=True)
    }


def packed_info(file: str, record: FileRecord) -> dict[str, Any]:
    """What a rank's information says under ``PACKED``; ``file`` is a path from the artifact's directory."""
    return {"file": file, "bytes": record.bytes, "sha256": record.sha256}


def packed_from(info: Mapping[str, Any], directory: Path, other: Path) -> dict[str, Any]:
    """The entry of a rank's ``info`` in the artifact ``directory``, as it reads in ``other``: the two may be moved together."""
    if PACKED not in info:
        return {}
    file = os.path.relpath(directory / info[PACKED]["file"], other)
    return {PACKED: info[PACKED] | {"file": Path(file).as_posix()}}


@dataclass(frozen=True)
class PackedWeights:
    """A ``checkpoint.Source`` that holds what one rank needs. ``boxes``: by the checkpoint's names, the pieces of it that are in
    the file, and in which of its tensors; ``stamp``: the identity of the checkpoint it was made of."""

    file: Path
    tensors: Mapping[str, StoredTensor]
    boxes: Mapping[str, tuple[tuple[str, Piece], ...]]
    stamp: dict[str, Any]

    @staticmethod
    def open(file: Path, weights: Mapping[str, Recipe], stamp: dict[str, Any]) -> PackedWeights:
        """``weights``: the recipes that the file was written from.

        Raises: UserError where the file is missing or broken, or holds other tensors.
        """
        tensors = read_header(file)
        boxes: dict[str, list[tuple[str, Piece]]] = {}
        for name, recipe in weights.items():
            if name not in tensors or (tensors[name].dtype, tensors[name].shape) != (recipe.dtype, recipe.shape):
                raise UserError(f"{file}: is not of the graph beside it: {name} differs; export it again")
            for piece in recipe.pieces:
                boxes.setdefault(piece.source, []).append((name, piece))
        return PackedWeights(file, tensors, {name: tuple(held) for name, held in boxes.items()}, stamp)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def dtype(self, name: str) -> str:
        return self.tensors[self.boxes[name][0][0]].dtype

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        """The box of ``shape`` at ``start`` of the checkpoint's tensor ``name``, a read-only view of the mapped file.

        Raises: UserError where this rank does not hold it.
        """
        for tensor, piece in self.boxes.get(name, ()):
            inside = tuple(a - b for a, b in zip(start, piece.start, strict=True))
            if all(a >= 0 and a + n <= size for a, n, size in zip(inside, shape, piece.shape, strict=True)):
                return _cut(map_tensor(self.tensors[tensor]), piece, inside, shape)
        raise UserError(
            f"{self.file}: the rank's packed weights do not hold {list(shape)} at {list(start)} of {name}; use the same"
            " mapping, or export without --pack_weights"
        )

    def identity(self) -> dict[str, Any]:
        return self.stamp


def _cut(packed: np.ndarray, piece: Piece, start: Shape, shape: Shape) -> np.ndarray:
    """The box of ``shape`` at ``start`` within ``piece``, out of the tensor that holds the piece; see ``weights.Piece``."""
    ones = len(piece.at) - len(shape)
    starts, sizes = (0,) * ones + start, (1,) * ones + shape
    place = tuple(slice(at + starts[p], at + starts[p] + sizes[p]) for at, p in zip(piece.at, piece.perm, strict=True))
    return packed[place].transpose(np.argsort(piece.perm)).reshape(shape)


def open_rank_source(
    directory: Path, info: Mapping[str, Any], identity: dict[str, Any], config: ModelConfig, threads: int = 1
) -> Source:
    """Where the weights of a rank of the artifact in ``directory`` are: its packed file where ``info`` (``Artifact.rank_info``)
    names one, else the checkpoint of ``identity``.

    Raises: UserError where either is missing or has changed since.
    """
    from moecompiler.graph import load_recipes

    packed = info.get(PACKED)
    if packed is None:
        return open_source(identity, config, threads)
    file = directory / packed["file"]
    check_files(directory, {packed["file"]: FileRecord.from_json(packed)})
    return PackedWeights.open(file, load_recipes(file.with_suffix(".weights.json")), identity)
