"""Numbers that are a pure function of a key and an index: any part of a tensor can be made by itself."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from moecompiler.weights import Shape

CHUNK = 1 << 16  # elements made together: their integers, scratch and floats stay in the processor's second-level cache


def key_of(text: str) -> int:
    """A 32-bit key of any text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _mix(x: np.ndarray, scratch: np.ndarray) -> None:
    """``lowbias32``, in place: a bijection of uint32 in which every input bit sways every output bit.

    By Chris Wellons, public domain: https://github.com/skeeto/hash-prospector
    """

    def fold(shift: int) -> None:
        np.bitwise_xor(x, np.right_shift(x, np.uint32(shift), out=scratch), out=x)

    fold(16)
    np.multiply(x, np.uint32(0x7FEB352D), out=x)
    fold(15)
    np.multiply(x, np.uint32(0x846CA68B), out=x)
    fold(16)


def fill_uniform(out: np.ndarray, key: int, start: Shape, center: float, deviation: float) -> None:
    """Fills ``out [rows, columns]`` with what a tensor holds from ``start`` on, a hash of key, row and column.

    Rows and columns are hashed one after the other: an index into the whole would need 64 bits, at half the speed.
    """
    rows, columns = out.shape
    row_keys = np.arange(start[0], start[0] + rows, dtype=np.uint32) ^ np.uint32(key)
    _mix(row_keys, np.empty_like(row_keys))
    column_ids = np.arange(start[1], start[1] + columns, dtype=np.uint32)
    width = max(1, min(columns, CHUNK))
    height = max(1, min(rows, CHUNK // width))
    bits, scratch = np.empty((2, height, width), np.uint32)
    floats = np.empty((height, width), np.float32)
    scale = np.float32(math.sqrt(3) * deviation / 2**31)  # uniform on ±a has deviation a / √3
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            target = out[row : row + height, column : column + width]
            h, w = target.shape
            x, y, f = bits[:h, :w], scratch[:h, :w], floats[:h, :w]
            np.bitwise_xor(row_keys[row : row + h, None], column_ids[column : column + w], out=x)
            _mix(x, y)
            np.multiply(x.view(np.int32), scale, out=f, dtype=np.float32, casting="unsafe")
            if center:
                np.add(f, np.float32(center), out=f)
            target[...] = f
