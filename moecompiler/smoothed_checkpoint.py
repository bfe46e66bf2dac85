"""A checkpoint whose weights are scaled for quantizing, as AWQ finds it best: the same function, other numbers.

Scales are found by ``calibration.awq`` and lie in a file beside the checkpoint: what a tensor's rows and columns are
multiplied by, and how far below its largest magnitude each group of a quantized weight is clipped. A recipe of weights reads
through it, so export stays by reference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moecompiler.atomic import json_text, replace, temporary_beside
from moecompiler.checkpoint import Source
from moecompiler.errors import UserError
from moecompiler.weights import Shape

FILE = "awq.safetensors"
FORMAT, VERSION = "moecompiler.awq", 1


@dataclass(frozen=True, eq=False)
class Smoothing:
    """By published name: ``rows`` and ``columns``, float32 ``[out]`` and ``[in]``, what these of a tensor are multiplied by
    (a norm ``[hidden]`` has rows); ``clips``, uint8 ``[out, groups]``, the hundredths of its largest magnitude that a group
    of a weight is clipped to. ``header``: what it was made of and how, JSON-able."""

    rows: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]
    clips: Mapping[str, np.ndarray]
    header: Mapping[str, Any]

    @property
    def names(self) -> frozenset[str]:
        """The tensors whose numbers are others."""
        return frozenset(self.rows) | frozenset(self.columns)


@dataclass(frozen=True)
class SmoothedCheckpoint:
    """A ``checkpoint.Source``: ``plain`` with the tensors of ``smoothing`` multiplied, in float32."""

    plain: Source
    smoothing: Smoothing
    path: Path
    sha256: str

    @property
    def files(self) -> tuple[Path, ...]:
        return self.plain.files

    def dtype(self, name: str) -> str:
        return "float32" if name in self.smoothing.names else self.plain.dtype(name)

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        box = self.plain.read(name, start, shape)
        rows, columns = self.smoothing.rows.get(name), self.smoothing.columns.get(name)
        if rows is None and columns is None:
            return box
        wide = box.astype(np.float32)
        if rows is not None:
            wide *= rows[start[0] : start[0] + shape[0]].reshape(-1, *(1 for _ in shape[1:]))
        if columns is not None:
            wide *= columns[start[1] : start[1] + shape[1]]
        return wide

    def clipping(self, name: str, start: Shape, shape: Shape, block: int) -> np.ndarray | None:
        """What the largest magnitudes of the groups of ``block`` in a box are multiplied by, float32 ``[out, groups]``; None:
        by 1.

        Raises: UserError where the search was for groups of another size.
        """
        clips = self.smoothing.clips.get(name)
        if clips is None:
            return None
        searched = self.smoothing.header["group_sizes"].get(name)
        if block != searched:
            raise UserError(
                f"{self.path}: was searched for groups of {searched}, and {name} is to have groups of {block}; compile anew with"
                " --qformat int4_awq"
            )
        groups = slice(start[1] // block, (start[1] + shape[1]) // block)
        return clips[start[0] : start[0] + shape[0], groups].astype(np.float32) / np.float32(100)

    def identity(self) -> dict[str, Any]:
        return self.plain.identity() | {"awq": {"file": str(self.path), "sha256": self.sha256}}


def open_smoothed(plain: Source, path: Path, sha256: str | None = None) -> SmoothedCheckpoint:
    """``sha256``: of the file as it was when it was first opened.

    Raises: UserError where there is no such file, it is no result of a search, or it has changed.
    """
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; search anew with --qformat int4_awq"
        ) from None
    if sha256 not in (None, found):
        raise UserError(f"{path}: changed since it was first read; compile anew with --qformat int4_awq")
    return SmoothedCheckpoint(plain, read_smoothing(path), path, found)


def read_smoothing(path: Path) -> Smoothing:
    """Raises: UserError where the file is not what ``write_smoothing`` wrote."""
    from safetensors import SafetensorError, safe_open

    parts: dict[str, dict[str, np.ndarray]] = {"rows": {}, "columns": {}, "clip": {}}
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("header", "null"))
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                tensor, _, kind = name.rpartition(".")
                parts[kind][tensor] = file.get_tensor(name)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{path}: is no result of AWQ's search ({error}); search anew with --qformat int4_awq"
        ) from None
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path}: is no result of AWQ's search; search anew with --qformat int4_awq")
    return Smoothing(parts["rows"], parts["columns"], parts["clip"], header)


def write_smoothing(path: Path, smoothing: Smoothing) -> None:
    """Whole or not at all; equal results give equal bytes. Raises: UserError where it cannot be written."""
    from safetensors.numpy import save

    kinds = {"rows": smoothing.rows, "columns": smoothing.columns, "clip": smoothing.clips}
    arrays = {f"{name}.{kind}": np.ascontiguousarray(each) for kind, of in kinds.items() for name, each in of.items()}
    header = dict(smoothing.header) | {"format": FORMAT, "version": VERSION}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            temporary.write_bytes(save(arrays, {"header": json_text(header)}))
            replace(temporary, path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from None
