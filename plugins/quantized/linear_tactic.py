"""How ``LinearInt8``, ``LinearInt4``, … are computed by Triton's kernels: one token, few tokens, and many."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moecompiler.plugins.launch import (
    TRITON_TYPES,
    Arena,
    Argument,
    Dims,
    Input,
    Kernel,
    Launch,
    Output,
    Workspace,
    power_of_two,
    shared_memory,
)

_MODULE = "moecompiler.plugins.quantized.linear_kernels"
MOVED_COLUMNS = 1024
"""Per program that rounds, splits or adds up."""


@dataclass(frozen=True)
class Weight:
    """``kind`` as the kernels have it; ``block`` columns have a scale, all of a row where it is 0."""

    kind: str
    out: int
    columns: int
    block: int

    @property
    def halves(self) -> bool:
        """Whether there are two codes to a byte."""
        return self.kind not in ("int8", "fp8")


@dataclass(frozen=True)
class One:
    """For one token: rows of a program, and how many columns it takes at a time."""

    rows: int
    columns: int
    warps: int = 4


@dataclass(frozen=True)
class Tile:
    """Tiles for up to ``tokens`` (0: any number): ``m`` of these, ``n`` of the outputs, ``k`` columns at a time.

    Columns are divided until there are ``programs`` per multiprocessor, but no finer than ``least`` columns a program.
    ``prepared``: x is rounded or split by a launch of its own, not by each program. ``scaled``: sums of blocks are scaled, not
    weights, where a block has ``k`` columns or more.
    """

    tokens: int
    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 4
    programs: int = 4
    least: int = 512
    prepared: bool = False
    scaled: bool = True


@dataclass(frozen=True)
class LinearTactic:
    """``tiles`` are in ascending order of tokens; the last takes any number. ``fast``: codes are unpacked in PTX, which Triton's
    interpreter does not have. ``processors``: the card's multiprocessors, which decide how columns are divided."""

    name: str
    weight: Weight
    dtype: str
    sm: int
    one: One | None
    tiles: tuple[Tile, ...]
    processors: int
    fast: bool = True

    @property
    def _native(self) -> bool:
        """Whether the card has E4M3."""
        return self.sm >= 89

    @property
    def _overlapped(self) -> bool:
        return self.sm >= 90

    @cached_property
    def _table(self) -> dict[tuple[Any, ...], Kernel]:
        table: dict[tuple[Any, ...], Kernel] = {}
        if self.one:
            table["one",] = self._one_kernel(self.one)
        for tile in self.tiles:
            table[tile, False] = self._tile_kernel(tile, False)
            if self._parts(tile, 1) > 1:
                table[tile, True] = self._tile_kernel(tile, True)
                table["add",] = self._mover("add_parts", "results:F y:T tokens:i32 parts:i32", OUT=self.weight.out)
            if tile.prepared and self.weight.kind != "int8":
                table["prepare",] = self._prepare_kernel()
        return table

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        return tuple(self._table.values())

    def workspace(self, dims: Dims) -> int:
        tokens = math.prod(dims[0][:-1])
        limits = [tile.tokens for tile in self.tiles[:-1] if tile.tokens < tokens]
        # fewer tokens may be divided more finely
        counts = {tokens, *limits, *self._divided_most(tokens)}
        return max((self._plan(count)[1] for count in counts if count), default=0)

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        tokens = math.prod(dims[0][:-1])
        return self._plan(tokens)[0] if tokens else ()

    # what is launched

    def _plan(self, tokens: int) -> tuple[tuple[Launch, ...], int]:
        arena, weight = Arena(), self.weight
        order = {key: i for i, key in enumerate(self._table)}
        scales, more = Input(2), Input(self._more)
        if tokens == 1 and self.one:
            grid = (-(-weight.out // self.one.rows), 1, 1)
            return (Launch(order["one",], grid, (Input(0), Input(1), scales, more, Output(0))),), 0
        tile = next(tile for tile in self.tiles if tokens <= tile.tokens or not tile.tokens)
        launches: list[Launch] = []
        x: Input | Workspace = Input(0)
        if tile.prepared and weight.kind != "int8":
            x = arena.take(tokens * weight.columns * (1 if weight.kind == "fp8" and self._native else 2))
            columns = weight.columns // 4 if weight.halves else weight.columns
            prepared: tuple[Argument, ...] = (Input(0), x, tokens) if weight.halves else (Input(0), more, x)
            launches.append(Launch(order["prepare",], (tokens, -(-columns // MOVED_COLUMNS), 1), prepared))
        parts, share = self._division(tile, tokens)
        y: Output | Workspace = Output(0) if parts == 1 else arena.take(4 * parts * tokens * weight.out)
        grid = (-(-tokens // tile.m), -(-weight.out // tile.n), parts)
        args = (x, Input(1), scales, more, y, tokens, share // 4 if weight.halves else share)
        launches.append(Launch(order[tile, parts > 1], grid, args, self._overlapped and bool(launches)))
        if parts > 1:
            grid = (tokens, -(-weight.out // MOVED_COLUMNS), 1)
            launches.append(Launch(order["add",], grid, (y, Output(0), tokens, parts), self._overlapped))
        return tuple(launches), arena.size

    @property
    def _more(self) -> int:
        """The input that a kind has besides codes and scales; those that have none do not read it."""
        return 2 if self.weight.kind in ("int8", "int4") else 3

    def _division(self, tile: Tile, tokens: int) -> tuple[int, int]:
        """How many programs add up a tile, and the columns of each."""
        steps = -(-self.weight.columns // self._k(tile))
        parts = self._parts(tile, tokens)
        share = -(-steps // parts)
        return -(-steps // share), share * self._k(tile)

    def _parts(self, tile: Tile, tokens: int) -> int:
        tiles = -(-tokens // tile.m) * -(-self.weight.out // tile.n)
        return max(1, min(tile.programs * self.processors // tiles, self.weight.columns // tile.least))

    def _divided_most(self, tokens: int) -> list[int]:
        """For each tile, the most tokens below ``tokens`` that are divided into each number of parts."""
        result: list[int] = []
        for tile in self.tiles:
            rows = range(tile.m, min(tokens, tile.tokens or tokens), tile.m)
            last = {self._division(tile, count)[0]: count for count in rows if self._parts(tile, count) > 1}
            result += last.values()
        return result

    # what is compiled

    def _k(self, tile: Tile) -> int:
        """Columns of a tile: no more than there are, and blocks or a part of one."""
        return fitting_columns(self.weight, tile.k)

    def _kernel(self, function: str, types: str, constants: Mapping[str, Any], warps: int, stages: int = 1) -> Kernel:
        """``types`` lists arguments as ``name:type``, ``T`` standing for a pointer to the node's own type."""
        kinds = {"T": f"*{TRITON_TYPES[self.dtype]}:16", "B": "*i8:16", "F": "*fp32:16", "E": "*fp8e4nv:16"}
        named = (item.split(":", 1) for item in types.split())
        signature = tuple((name, kinds.get(kind, kind)) for name, kind in named)
        return Kernel(_MODULE, function, signature, tuple(constants.items()), warps, stages)

    @property
    def _weight_types(self) -> str:
        scales = "B" if self.weight.kind == "nvfp4" else "T"
        more = {"int4_asymmetric": "B", "nvfp4": "F"}.get(self.weight.kind, "T")
        return f"codes:B scales:{scales} more:{more}"

    @property
    def _weight_constants(self) -> dict[str, Any]:
        weight = self.weight
        constants = {"OUT": weight.out, "IN": weight.columns, "KIND": weight.kind}
        return constants | ({"BLOCK": weight.block, "FAST": self.fast} if weight.halves else {})

    def _one_kernel(self, one: One) -> Kernel:
        weight = self.weight
        constants = {**self._weight_constants, "ROWS": one.rows, "NATIVE": self._native}
        function = "one_of_bytes"
        if weight.halves:
            group = weight.block or 128
            function = "one_of_halves"
            count = -(-weight.columns // group)
            groups = max(1, min(power_of_two(count), one.columns // power_of_two(group)))
            constants |= {"GROUP": group, "GROUPS": groups, "BYTES": power_of_two(group // 2)}
        else:
            constants["COLUMNS"] = min(one.columns, power_of_two(weight.columns))
        return self._kernel(function, f"x:T {self._weight_types} y:T", constants, one.warps)

    def _tile_kernel(self, tile: Tile, divided: bool) -> Kernel:
        weight, k = self.weight, self._k(tile)
        constants = {
            **self._weight_constants,
            "M": tile.m,
            "N": tile.n,
            "K": k,
            "FAST": self.fast,
            "NATIVE": self._native,
            "OVERLAPPED": self._overlapped,
        }
        if weight.halves:
            constants["SPLIT"] = tile.prepared
            constants["SCALED"] = tile.scaled and weight.block >= k and weight.kind != "nvfp4"
        else:
            constants["ROUNDED"] = tile.prepared and weight.kind == "fp8"
        rounded = constants.get("ROUNDED")
        x = "T" if not rounded else "E" if self._native else "*fp16:16"
        types = f"x:{x} {self._weight_types} y:{'F' if divided else 'T'} tokens:i32 share:i32:16"
        width = 1 if rounded and self._native else 2
        stage = k * (tile.n // (2 if weight.halves else 1) + width * tile.m)
        unpacked = 0 if weight.kind == "fp8" and self._native and tile.prepared else 2 * k * (tile.n + tile.m)
        stages = max(1, min(tile.stages, (shared_memory(self.sm) - unpacked - 4096) // stage))
        return self._kernel(f"tile_of_{'halves' if weight.halves else 'bytes'}", types, constants, tile.warps, stages)

    def _mover(self, function: str, types: str, **constants: Any) -> Kernel:
        all_constants = {**constants, "COLUMNS": MOVED_COLUMNS, "OVERLAPPED": self._overlapped}
        return self._kernel(function, types, all_constants, 4)

    def _prepare_kernel(self) -> Kernel:
        columns = self.weight.columns
        if self.weight.halves:
            return self._mover("split", "x:T split_x:T tokens:i32", IN=columns)
        rounded = "E" if self._native else "*fp16:16"
        return self._mover("round_to_e4m3", f"x:T input_scale:T rounded:{rounded}", IN=columns, NATIVE=self._native)


def fitting_columns(weight: Weight, wanted: int) -> int:
    """The largest power of two up to ``wanted`` that blocks divide, or that divides them, as far as a row goes; 0: none of those
    that the matrix units take."""
    k = min(wanted, power_of_two(weight.columns))
    while weight.block and k % weight.block and weight.block % k:
        k //= 2
    return k if k >= (64 if weight.halves else 32) else 0
