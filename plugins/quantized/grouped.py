"""What the grouped products of codes and those of FP8 share, for SM 9.0."""

from __future__ import annotations

from dataclasses import replace

from moecompiler.plugins.launch import Input, Kernel, TensorMap
from moecompiler.plugins.moe.compiled import NodeKernels
from moecompiler.plugins.moe.tiles import Sizes

SM = 90
MOST_EXPERTS = 64
"""What is known of them has to fit beside the rings in shared memory."""


def down_codes(base: Input, local: int, rows: int, row_bytes: int) -> TensorMap:
    """Of rows by expert, 128 rows of 128 bytes at once."""
    return TensorMap(base, "int8", (local, rows, row_bytes), (rows * row_bytes, row_bytes), (1, 128, 128))


def place_rows(sizes: Sizes, dtype: str) -> Kernel:
    """``place`` that finds rows and moves nothing: x has no columns for it."""
    return NodeKernels(replace(sizes, hidden=0), dtype, SM).place(1)
