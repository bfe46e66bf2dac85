"""Safetensors files by offset: read, and laid out for ``safetensors_writing``.

An ONNX initializer names a file and an offset into it, and a rank's weights are too large to hold at once; the
``safetensors`` package tells no offsets and writes only what is in memory. The format: 8 bytes, little-endian, the length
of the JSON header; the header, ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` with offsets from its own end;
the data, without holes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moecompiler.errors import UserError
from moecompiler.weights import NUMPY_DTYPES, Shape

MAX_HEADER = 100_000_000  # as in the format's own reader: no model needs more, and a broken length field asks for more
PAGE = 4096  # where data starts in the files written here, so that it can be mapped by itself
ALIGNMENT = 64  # what vector loads of a weight like best
_LONG = 64 << 10  # bytes from which on a run is read faster by itself than mapped and touched
_SPARSE = 16  # a box of less than this part of the bytes between its ends is read where it is touched alone

# the format's name of a dtype → ours (numpy's or ml_dtypes') and its size in bits
_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn", 4),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
_CODES = {name: (code, bits) for code, (name, bits) in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """``nbytes`` at ``offset`` (from the file's start) of ``file``: a row-major, little-endian tensor."""

    file: Path
    name: str
    dtype: str
    shape: Shape
    offset: int
    nbytes: int


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of ``bfloat16``, ``float32``, ``int8``, …

    Raises: ValueError for the packed types of less than a byte, which numpy stores otherwise.
    """
    if _CODES[name][1] < 8:
        raise ValueError(f"{name} is packed; numpy has no such layout")
    return NUMPY_DTYPES.get(name) or np.dtype(getattr(ml_dtypes, name, name))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What the file holds, by name, in the order of the header; reads nothing but the header.

    Raises: UserError where the file cannot be read, or is no whole and well-formed safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or (length <= MAX_HEADER and 8 + length > size):
                raise UserError(f"{path}: truncated: {size} bytes do not hold its header; download or copy it again")
            if length > MAX_HEADER:
                raise UserError(
                    f"{path}: claims a header of {length} bytes (at most {MAX_HEADER}); no safetensors file?"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    header = _parse_json(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: broken header: __metadata__ is {type(metadata).__name__}, not an object")
    tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_coverage(path, tensors.values(), 8 + length, size)
    return tensors


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
        return data

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken header, not the JSON of a safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: broken header: it is {type(header).__name__}, not an object")
    return header


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """One tensor's entry, checked by itself."""

    def whole_numbers(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    where = f"{path}: broken header: {name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UserError(f"{where} has no dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise UserError(f"{where} has the unknown dtype {code!r}; known are {', '.join(_DTYPES)}")
    if not whole_numbers(shape):
        raise UserError(f"{where} has the shape {shape!r}; it must be a list of non-negative integers")
    if not whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where} has the data_offsets {offsets!r}; they must be [begin, end] with 0 ≤ begin ≤ end")
    begin, end = offsets
    dtype, bits = _DTYPES[code]
    if math.prod(shape) * bits != (end - begin) * 8:
        raise UserError(
            f"{where} takes {end - begin} bytes, but {code} {shape} needs {math.prod(shape) * bits / 8:.0f} bytes"
        )
    return StoredTensor(path, name, dtype, tuple(shape), data_start + begin, end - begin)


def _check_coverage(path: Path, tensors: Iterable[StoredTensor], start: int, size: int) -> None:
    """Raises UserError where the tensors do not fill bytes ``start`` to ``size`` of the file, each byte once."""
    at, before = start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise UserError(
                f"{path}: truncated: {tensor.name} ends at byte {end}, the file at {size}; download or copy it again"
            )
        if tensor.offset < at:
            raise UserError(f"{path}: broken header: {tensor.name} overlaps {before}")
        if tensor.offset > at:
            raise UserError(
                f"{path}: broken header: {tensor.offset - at} bytes before {tensor.name} belong to no tensor"
            )
        at, before = end, tensor.name
    if at != size:
        raise UserError(f"{path}: {size - at} bytes after {before} belong to no tensor; download or copy it again")


def map_tensor(stored: StoredTensor) -> np.ndarray:
    """The tensor as a read-only view of the mapped file: only what is then looked at is read.

    Raises: UserError where the file is gone or has become too short.
    """
    dtype = numpy_dtype(stored.dtype)
    if stored.nbytes == 0:  # mmap refuses empty ranges
        return np.empty(stored.shape, dtype)
    try:
        mapped = np.memmap(stored.file, dtype, "r", stored.offset, stored.shape)
    except (OSError, ValueError) as error:
        raise UserError(f"{stored.file}: {stored.name} cannot be read from it any more: {error}") from None
    return mapped.view(np.ndarray)


def read_ahead(stored: StoredTensor, start: Shape, shape: Shape) -> None:
    """Has the system fetch the box of ``shape`` at ``start`` that is about to be read through ``map_tensor``: page by page, as it
    is touched, a box that is not one run of bytes would come at a fraction of a disk's speed. Sparse boxes are left alone."""
    size = math.prod(shape)
    if size == 0 or not hasattr(os, "posix_fadvise"):
        return
    itemsize = stored.nbytes // math.prod(stored.shape)
    strides = [math.prod(stored.shape[axis + 1 :]) for axis in range(len(stored.shape))]
    first = sum(a * stride for a, stride in zip(start, strides, strict=True))
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if size * _SPARSE < span:
        return
    with suppress(OSError), stored.file.open("rb", buffering=0) as file:
        at, count = stored.offset + first * itemsize, span * itemsize
        os.posix_fadvise(file.fileno(), at, count, os.POSIX_FADV_WILLNEED)


def read_into(stored: StoredTensor, start: Shape, shape: Shape, out: np.ndarray) -> bool:
    """Reads the box of ``shape`` at ``start`` into ``out``, a C-contiguous array of that shape and of the stored dtype. Memory
    that is mapped, or new, costs the system work by the page; this takes neither. False, and nothing is read, where the box is
    of short runs of bytes.

    Raises: UserError where the file is gone or has become too short.
    """
    whole = next((a for a in range(len(shape)) if shape[a:] == stored.shape[a:]), len(shape))
    split = max(0, whole - 1)  # from this axis on the box is one run
    run = math.prod(shape[split:]) * out.itemsize
    if run < _LONG or not hasattr(os, "preadv"):
        return False
    strides = [math.prod(stored.shape[axis + 1 :]) * out.itemsize for axis in range(len(shape))]
    data = out.reshape(-1).view(np.uint8).data
    try:
        with stored.file.open("rb", buffering=0) as file:
            for index, outer in enumerate(np.ndindex(*shape[:split])):
                place = (*(a + i for a, i in zip(start, outer, strict=False)), *start[split:])
                at = stored.offset + sum(a * stride for a, stride in zip(place, strides, strict=True))
                _read_run(file.fileno(), data[index * run : (index + 1) * run], at)
    except (OSError, EOFError) as error:
        raise UserError(f"{stored.file}: {stored.name} cannot be read from it any more: {error}") from None
    return True


def _read_run(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        count = os.preadv(descriptor, [data[done:]], at + done)
        if count == 0:
            raise EOFError(f"it ends at byte {at + done}")
        done += count


def layout(
    tensors: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """Where tensors of the given dtypes and shapes go in a file: (all bytes before the data, offsets, file size).

    Offsets count from the file's start and are in the order of writing: first the tensors whose size is a multiple of
    64 bytes, which keeps each of them on such a multiple, for the format allows no gaps; then the others, the wider dtypes
    first, which keeps their elements aligned.
    """

    def nbytes(name: str) -> int:
        dtype, shape = tensors[name]
        bits = math.prod(shape) * _CODES[dtype][1]
        if bits % 8:
            raise ValueError(f"{name}: {dtype} {shape} does not fill whole bytes")
        return bits // 8

    def rank(name: str) -> tuple[bool, int]:
        odd = nbytes(name) % ALIGNMENT != 0
        return odd, -_CODES[tensors[name][0]][1] if odd else 0

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    at = 0
    for name in sorted(tensors, key=rank):
        dtype, shape = tensors[name]
        begins[name], at = at, at + nbytes(name)
        header[name] = {"dtype": _CODES[dtype][0], "shape": list(shape), "data_offsets": [begins[name], at]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}, start + at
