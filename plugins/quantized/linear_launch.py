"""Tactics of ``LinearInt8``, ``LinearInt4``, ….

Every one computes any number of tokens. They differ in how one token is computed, in tiles, and in where they go from few to
many; a tile's columns are divided among programs where there are too few tiles to keep a card busy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moecompiler.plugins.launch import AnyKernel, Dims, Launch, Tactic, multiprocessors
from moecompiler.plugins.quantized import grouped_codes, grouped_fp8
from moecompiler.plugins.quantized.dequantize import forms
from moecompiler.plugins.quantized.linear_tactic import LinearTactic, One, Tile, Weight, fitting_columns

_KINDS = {"Int8": "int8", "Int4": "int4", "Int4Asymmetric": "int4_asymmetric", "Fp8": "fp8", "Nvfp4": "nvfp4"}
_NVFP4_BLOCK = 16


@dataclass(frozen=True)
class Joined:
    """Up to ``limit`` tokens by the tiles of ``few``, more by ``many``."""

    name: str
    few: LinearTactic
    limit: int
    many: Tactic

    @cached_property
    def kernels(self) -> tuple[AnyKernel, ...]:
        return (*self.few.kernels, *self.many.kernels)

    def workspace(self, dims: Dims) -> int:
        tokens = math.prod(dims[0][:-1])
        few = self.few.workspace(((min(tokens, self.limit), dims[0][-1]), *dims[1:]))
        return max(few, self.many.workspace(dims)) if tokens > self.limit else few

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        if math.prod(dims[0][:-1]) <= self.limit:
            return self.few.launches(dims)
        first = len(self.few.kernels)
        return tuple(replace(launch, kernel=first + launch.kernel) for launch in self.many.launches(dims))


def _joined(few: LinearTactic, limit: int, many: Tactic) -> Joined:
    """Without the tiles that are not used."""
    tiles = tuple(tile for tile in few.tiles if 0 < tile.tokens <= limit)
    return Joined(f"{few.name}, {many.name} from {limit + 1}", replace(few, tiles=tiles), limit, many)


def weight_of(op: str, attributes: Mapping[str, Any], dims: Dims) -> Weight | None:
    """The weight of a node; None where the kernels cannot do it."""
    form = op.removeprefix("Linear")
    kind = _KINDS.get(form.removesuffix("Rows"))
    if kind is None:
        return None
    out, columns = dims[1]
    if kind == "nvfp4":
        columns *= 2
    block = _NVFP4_BLOCK if kind == "nvfp4" else attributes.get("block_size", 0)
    weight = Weight(kind, out, columns, block)
    # rows begin at a multiple of 16 bytes; 16 bytes are of one block, or two
    fits = columns % (32 if weight.halves else 16) == 0 and (not block or (block % 16 == 0 and columns % block == 0))
    return weight if fits and fitting_columns(weight, 64) else None


def tactics(op: str, attributes: Mapping[str, Any], dims: Dims, dtype: str, sm: int) -> tuple[Tactic, ...]:
    """Of ``dims`` those of the weight have to be known. None for float32, where features are stored in another order, and where
    rows of codes are no multiple of 16 bytes or blocks no multiple of 16 columns."""
    weight = weight_of(op, attributes, dims)
    if dtype not in ("float16", "bfloat16") or weight is None:
        return ()
    rows, tiles, thin = triton_tactics(weight, dtype, sm)
    if weight.kind == "fp8":
        grouped: tuple[Tactic, ...] = grouped_fp8.linear_tactics(weight.out, weight.columns, dtype, sm)
    else:
        form = next(form for form in forms() if form.name == op.removeprefix("Linear"))
        grouped = grouped_codes.linear_tactics(form, weight.block, weight.out, weight.columns, dtype, sm)
    joined = tuple(_joined(few, limit, many) for few, limit in ((rows, 16), (thin, 64)) for many in grouped)
    return (*joined, tiles) if joined else (rows, tiles, thin)


def triton_tactics(weight: Weight, dtype: str, sm: int) -> tuple[LinearTactic, LinearTactic, LinearTactic]:
    """By Triton's kernels alone."""
    few = (
        Tile(16, 16, 64, 256),
        Tile(32, 32, 64, 256 if weight.halves else 128, programs=3),
        Tile(64, 64, 64, 128, programs=2, least=1024),
    )
    k = 128 if weight.kind == "fp8" else 64
    middle = Tile(128, 128, 64, k, 4, 4, 2, 1024, prepared=True, scaled=False)
    many = Tile(0, 128, 128, k, 8, 3, 1, 1024, prepared=True, scaled=False)
    rows = LinearTactic("rows", weight, dtype, sm, One(4, 4096), (*few, middle, many), multiprocessors(sm))
    thin = (replace(few[0], n=32, programs=6), *few[1:])
    return (
        rows,
        replace(rows, name="tiles", one=None, tiles=(*few, middle, replace(many, m=256))),
        replace(rows, name="thin tiles", one=None, tiles=(*thin, middle, many)),
    )
