"""Safetensors files written tensor by tensor, one alone or several side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from moecompiler.errors import UserError
from moecompiler.safetensors_file import layout, numpy_dtype
from moecompiler.weights import Shape

CHUNK = 16 << 20  # bytes hashed and written between two reports
PIECE = (
    256 << 10
)  # bytes handed to the system at a time, as cp does: it takes whole large pages for more, which cost it time
Produce = Callable[[str], np.ndarray | Iterable[np.ndarray]]


@dataclass(frozen=True)
class Outgoing:
    """A file to be written: dtypes and shapes of its tensors, and who makes them: whole, or in bands, runs of the tensor's
    elements in row-major order."""

    path: Path
    tensors: Mapping[str, tuple[str, Shape]]
    produce: Produce
    metadata: Mapping[str, str] | None = None


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, Shape]],
    produce: Produce,
    progress: Callable[[int], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes one file; see ``write_side_by_side``."""
    (digest,) = write_side_by_side([Outgoing(path, tensors, produce, metadata)], progress)
    return digest


def write_side_by_side(files: Sequence[Outgoing], progress: Callable[[int], None] | None = None) -> list[str]:
    """Writes files, a band of each in turn, and returns their SHA-256s in hex. So what several of them take from one place is
    asked for at one time.

    While a band is hashed and written the next is made; the one before may be overwritten then. A tensor that comes whole is
    gone before anything else is made. ``progress`` is called with the number of bytes just written. Paths are overwritten in
    place: give temporary names.
    Raises: UserError where a file cannot be written; ValueError where ``produce`` gives another dtype or shape.
    """
    with ExitStack() as stack:
        opened = [_File(each.path, stack, progress) for each in files]
        hashing = stack.enter_context(ThreadPoolExecutor(1))
        making = stack.enter_context(ThreadPoolExecutor(1))
        bands = _in_turn([_bands(number, each) for number, each in enumerate(files)])
        upcoming = making.submit(next, bands, None)
        while (made := upcoming.result()) is not None:
            if made.more:
                upcoming = making.submit(next, bands, None)
            opened[made.file].put(made.data, hashing)
            if not made.more:
                del made
                upcoming = making.submit(next, bands, None)
        return [each.digest.hexdigest() for each in opened]


@dataclass
class _Band:
    """``more``: whether its tensor comes in several. ``file``: which of the files it belongs to."""

    data: memoryview
    more: bool
    file: int


class _File:
    """A file that grows. Raises: UserError where it cannot be made."""

    def __init__(self, path: Path, stack: ExitStack, progress: Callable[[int], None] | None):
        self.path, self.digest, self._progress = path, hashlib.sha256(), progress
        try:
            self._file = stack.enter_context(path.open("wb", buffering=0))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None

    def put(self, data: memoryview, hashing: ThreadPoolExecutor) -> None:
        """Hashes and writes, both at once: either alone takes as long as a disk does."""
        for at in range(0, len(data), CHUNK):
            chunk = data[at : at + CHUNK]
            hashed, done = hashing.submit(self.digest.update, chunk), 0
            try:
                while done < len(chunk):
                    done += self._file.write(chunk[done : done + PIECE])  # unbuffered, so that a full disk is met here
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from None
            finally:
                hashed.result()
            if self._progress is not None:
                self._progress(done)


def _bands(number: int, file: Outgoing) -> Iterator[_Band]:
    """Everything that the file holds, in order."""
    header, offsets, _ = layout(file.tensors, file.metadata)
    yield _Band(memoryview(header), False, number)
    for name in offsets:
        (dtype, shape), count = file.tensors[name], 0
        made = file.produce(name)
        whole = isinstance(made, np.ndarray)
        parts = iter((made,) if isinstance(made, np.ndarray) else made)
        del made
        while (array := next(parts, None)) is not None:
            if array.dtype != numpy_dtype(dtype) or (whole and array.shape != tuple(shape)):
                raise ValueError(f"{name}: produced {array.dtype} {array.shape} for {dtype} {shape}")
            count += array.size
            yield _Band(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, not whole, number)
            del array
        if count != prod(shape):
            raise ValueError(f"{name}: produced {count} elements for {dtype} {shape}")


def _in_turn(sources: Sequence[Iterator[_Band]]) -> Iterator[_Band]:
    """One of each, again and again."""
    running = list(sources)
    while running:
        for source in list(running):
            band = next(source, None)
            if band is None:
                running.remove(source)
            else:
                yield band
            del band
