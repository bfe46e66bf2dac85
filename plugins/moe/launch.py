"""Plans of ``MoE``: one token, few tokens, and many tokens sorted by expert.

Every tactic computes any number of tokens; they differ in tiles and in where they go from few to many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moecompiler.config import SPARSE_MIXER_EPSILON
from moecompiler.plugins.launch import (
    TRITON_TYPES,
    Arena,
    Dims,
    Input,
    Kernel,
    Launch,
    Output,
    Workspace,
    multiprocessors,
    power_of_two,
    shared_memory,
)

_MODULE = "moecompiler.plugins.moe"
_ROUTED_TOKENS = 16  # per program of routing where there are many
_MOVED_COLUMNS = 512  # per program of sorting
_COMBINED_COLUMNS = 1024


@dataclass(frozen=True)
class Sizes:
    """A node's sizes; ``mode`` is its ``normalization_mode``."""

    hidden: int
    intermediate: int
    experts: int
    local: int
    top_k: int
    mode: int


@dataclass(frozen=True)
class One:
    """Tiles for one token: rows of weights and columns at a time, of the up and of the down product."""

    up_rows: int = 2
    up_block: int = 4096
    down_rows: int = 1
    down_block: int = 2048
    warps: int = 4


@dataclass(frozen=True)
class Few:
    """Tiles for up to ``tokens`` tokens: rows and columns of weights; ``parts``: programs that share the sum over F."""

    tokens: int
    rows: int = 64
    columns: int = 128
    stages: int = 3
    warps: int = 4
    parts: int = 1


@dataclass(frozen=True)
class Tile:
    """Outputs and columns of a tile; ``programs`` per multiprocessor. The up product's is as wide for gate and for up each."""

    outputs: int
    columns: int = 64
    stages: int = 4
    warps: int = 8
    programs: int = 1


@dataclass(frozen=True)
class Many:
    """Tiles of ``rows`` for up to ``tokens`` tokens (0: any number); with ``tails`` an expert's last up tile may be smaller."""

    tokens: int = 0
    rows: int = 128
    up: Tile = Tile(128)
    down: Tile = Tile(256)
    tails: bool = False


@dataclass(frozen=True)
class _Step:
    """A launch whose grid and numbers are known; ``kernel`` is by key."""

    kernel: tuple[Any, ...]
    grid: tuple[int, int, int]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class MoETactic:
    """``few`` and ``many`` are in ascending order of tokens; the last of ``many`` takes any number. ``processors``: the card's
    multiprocessors, which decide the grids for many tokens."""

    name: str
    sizes: Sizes
    dtype: str
    sm: int
    one: One | None
    few: tuple[Few, ...]
    many: tuple[Many, ...]
    processors: int

    @cached_property
    def _table(self) -> dict[tuple[Any, ...], Kernel]:
        table: dict[tuple[Any, ...], Kernel] = {}
        if self.one or self.few:
            table["route", 1] = self._route(1)
        table["route", _ROUTED_TOKENS] = self._route(_ROUTED_TOKENS)
        if self.one:
            table.update(self._one_kernels(self.one))
        for few in self.few:
            table.update(self._few_kernels(few))
        for many in self.many:
            table.update(self._many_kernels(many))
        if self.few:
            table["few_combine",] = self._combine()
        return table

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return tuple(dict.fromkeys(self._table.values()))

    def workspace(self, dims: Dims) -> int:
        tokens = dims[0][0]
        limits = [few.tokens for few in self.few] + [many.tokens for many in self.many[:-1]]
        limits = [limit for limit in limits if limit < tokens]
        return max(self._plan(self._way(count), count)[1] for count in (tokens, *limits))

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        tokens = dims[0][0]
        if not tokens:
            return ()
        steps, _ = self._plan(self._way(tokens), tokens)
        order = {kernel: i for i, kernel in enumerate(self.kernels)}
        return tuple(
            Launch(order[self._table[step.kernel]], step.grid, step.args, self._overlapped and i > 0)
            for i, step in enumerate(steps)
        )

    @property
    def _overlapped(self) -> bool:
        return self.sm >= 90

    def _way(self, tokens: int) -> One | Few | Many:
        if tokens == 1 and self.one:
            return self.one
        few = next((few for few in self.few if tokens <= few.tokens), None)
        return few or next(many for many in self.many if tokens <= many.tokens or not many.tokens)

    # what is launched

    def _plan(self, way: One | Few | Many, tokens: int) -> tuple[list[_Step], int]:
        arena, sizes = Arena(), self.sizes
        assignments = tokens * sizes.top_k
        chosen, weights = arena.take(4 * assignments), arena.take(4 * assignments)
        block = _ROUTED_TOKENS if isinstance(way, Many) else 1
        blocks = -(-tokens // block)
        counts = arena.take(4 * blocks * self._local_block)
        route_args = (Input(0), Input(1), Input(4), chosen, weights, counts, tokens)
        steps = [_Step(("route", block), (blocks, 1, 1), route_args)]
        if isinstance(way, One):
            steps += self._one_steps(way, arena, chosen, weights)
        elif isinstance(way, Few):
            steps += self._few_steps(way, arena, chosen, weights, tokens)
        else:
            steps += self._many_steps(way, arena, chosen, weights, counts, tokens)
        return steps, arena.size

    def _one_steps(self, one: One, arena: Arena, chosen: Workspace, weights: Workspace) -> list[_Step]:
        sizes = self.sizes
        inner = arena.take(2 * sizes.top_k * sizes.intermediate)
        up_grid = (sizes.top_k, -(-sizes.intermediate // one.up_rows), 1)
        down_grid = (-(-sizes.hidden // one.down_rows), 1, 1)
        return [
            _Step(("one_up",), up_grid, (Input(0), Input(2), chosen, inner)),
            _Step(("one_down",), down_grid, (inner, Input(3), chosen, weights, Output(0))),
        ]

    def _few_steps(self, few: Few, arena: Arena, chosen: Workspace, weights: Workspace, tokens: int) -> list[_Step]:
        sizes = self.sizes
        hit = min(sizes.local, tokens * sizes.top_k)
        inner = arena.take(2 * sizes.local * tokens * sizes.intermediate)
        results = arena.take(4 * few.parts * sizes.local * tokens * sizes.hidden)
        up_grid = (-(-sizes.intermediate // few.rows), hit, 1)
        down_grid = (-(-sizes.hidden // few.rows), hit, few.parts)
        return [
            _Step(("few_up", few), up_grid, (Input(0), Input(2), chosen, inner, tokens)),
            _Step(("few_down", few), down_grid, (inner, Input(3), chosen, results, tokens)),
            _Step(
                ("few_combine",),
                (tokens, -(-sizes.hidden // _COMBINED_COLUMNS), 1),
                (results, chosen, weights, Output(0), tokens, few.parts, sizes.local * tokens),
            ),
        ]

    def _many_steps(
        self, many: Many, arena: Arena, chosen: Workspace, weights: Workspace, counts: Workspace, tokens: int
    ) -> list[_Step]:
        sizes = self.sizes
        routed = tokens * min(sizes.top_k, sizes.local)
        row_tiles = -(-routed // many.rows) + sizes.local
        rows = row_tiles * many.rows
        places = arena.take(4 * tokens * sizes.top_k)
        totals = arena.take(4 * self._local_block)
        sorted_x = arena.take(2 * rows * sizes.hidden)
        inner = arena.take(2 * rows * sizes.intermediate)
        results = arena.take(2 * rows * sizes.hidden)
        blocks = -(-tokens // _ROUTED_TOKENS)
        place_args = (Input(0), chosen, counts, places, totals, sorted_x, tokens, blocks)
        up_programs = min(many.up.programs * self.processors, row_tiles * -(-sizes.intermediate // many.up.outputs))
        column_tiles = -(-sizes.hidden // many.down.outputs)
        down_programs = min(many.down.programs * self.processors, 8 * row_tiles * column_tiles)
        extra = arena.take(4 * down_programs * many.rows * many.down.outputs)
        return [
            _Step(("place", many.rows), (blocks, -(-sizes.hidden // _MOVED_COLUMNS), 1), place_args),
            _Step(("many_up", many), (up_programs, 1, 1), (sorted_x, Input(2), totals, inner, rows)),
            _Step(("many_down", many), (down_programs, 1, 1), (inner, Input(3), totals, results, extra, rows)),
            _Step(
                ("many_combine", many),
                (tokens, -(-sizes.hidden // _COMBINED_COLUMNS), 1),
                (results, extra, totals, places, weights, Output(0), down_programs),
            ),
        ]

    # what is compiled

    @property
    def _local_block(self) -> int:
        return max(2, power_of_two(self.sizes.local))

    def _kernel(
        self, file: str, function: str, types: str, constants: Mapping[str, Any], warps: int, stages: int = 1
    ) -> Kernel:
        """``types`` lists arguments as ``name:type``, ``T`` standing for a pointer to the node's own type."""
        named = (item.split(":", 1) for item in types.split())
        kinds = {"T": f"*{TRITON_TYPES[self.dtype]}:16", "I": "*i32:16", "F": "*fp32:16", "L": "*i64:16"}
        signature = tuple((name, kinds.get(kind, kind)) for name, kind in named)
        all_constants = (*constants.items(), ("OVERLAPPED", self._overlapped))
        return Kernel(f"{_MODULE}.{file}", function, signature, all_constants, warps, stages)

    def _route(self, tokens: int) -> Kernel:
        sizes = self.sizes
        experts = power_of_two(sizes.experts)
        constants = {
            "HIDDEN": sizes.hidden,
            "EXPERTS": sizes.experts,
            "LOCAL": sizes.local,
            "TOP_K": sizes.top_k,
            "MODE": sizes.mode,
            "THRESHOLD": 2 * SPARSE_MIXER_EPSILON,
            "E_BLOCK": max(16, experts) if tokens > 1 else max(2, experts),
            "L_BLOCK": self._local_block,
            "K_BLOCK": power_of_two(sizes.top_k),
            "H_BLOCK": 256 if tokens > 1 else max(64, min(power_of_two(sizes.hidden), 32768 // max(2, experts))),
            "T_BLOCK": tokens,
        }
        types = "x:T router:T expert_ids:L chosen:I weights:F counts:I tokens:i32"
        return self._kernel("routing_kernels", "route", types, constants, *((4, 4) if tokens > 1 else (16, 1)))

    def _one_kernels(self, one: One) -> dict[tuple[Any, ...], Kernel]:
        sizes = self.sizes
        common = {"HIDDEN": sizes.hidden, "INTERMEDIATE": sizes.intermediate}
        up = {**common, "ROWS": one.up_rows, "BLOCK": min(one.up_block, power_of_two(sizes.hidden))}
        down = {
            **common,
            "TOP_K": sizes.top_k,
            "ROWS": one.down_rows,
            "BLOCK": min(one.down_block, power_of_two(sizes.intermediate)),
        }
        return {
            ("one_up",): self._kernel("few_kernels", "one_up", "x:T gate_up:T chosen:I inner:T", up, one.warps),
            ("one_down",): self._kernel(
                "few_kernels", "one_down", "inner:T down:T chosen:I weights:F y:T", down, one.warps
            ),
        }

    def _few_kernels(self, few: Few) -> dict[tuple[Any, ...], Kernel]:
        sizes = self.sizes
        constants = {
            "HIDDEN": sizes.hidden,
            "INTERMEDIATE": sizes.intermediate,
            "LOCAL": sizes.local,
            "L_BLOCK": self._local_block,
            "TOP_K": sizes.top_k,
            "K_BLOCK": power_of_two(sizes.top_k),
            "M": few.tokens,
            "N": few.rows,
            "K": few.columns,
        }
        up_stages = self._stages(few.stages, 2 * few.columns * (2 * few.rows + few.tokens))
        down_stages = self._stages(2 * few.stages, 2 * few.columns * (few.rows + few.tokens))
        up = self._kernel(
            "few_kernels", "few_up", "x:T gate_up:T chosen:I inner:T tokens:i32", constants, few.warps, up_stages
        )
        types = "inner:T down:T chosen:I results:F tokens:i32"
        parts = {**constants, "PARTS": few.parts}
        down = self._kernel("few_kernels", "few_down", types, parts, few.warps, down_stages)
        return {("few_up", few): up, ("few_down", few): down}

    def _many_kernels(self, many: Many) -> dict[tuple[Any, ...], Kernel]:
        sizes = self.sizes
        placing = {
            "HIDDEN": sizes.hidden,
            "TOP_K": sizes.top_k,
            "L_BLOCK": self._local_block,
            "T_BLOCK": _ROUTED_TOKENS,
            "A_BLOCK": power_of_two(_ROUTED_TOKENS * sizes.top_k),
            "H_BLOCK": _MOVED_COLUMNS,
            "M": many.rows,
        }
        types = "x:T chosen:I counts:I rows:I totals:I sorted_x:T tokens:i32 blocks:i32"
        tiles = {
            "HIDDEN": sizes.hidden,
            "INTERMEDIATE": sizes.intermediate,
            "LOCAL": sizes.local,
            "L_BLOCK": self._local_block,
            "M": many.rows,
        }
        up, down = ({**tiles, "N": tile.outputs, "K": tile.columns} for tile in (many.up, many.down))
        combine = {name: down[name] for name in ("HIDDEN", "L_BLOCK", "M", "N")}
        combine |= {"TOP_K": sizes.top_k, "H_BLOCK": _COMBINED_COLUMNS}
        up_types = "sorted_x:T gate_up:T totals:I inner:T rows:i32"
        down_types = "inner:T down:T totals:I results:T extra:F rows:i32"
        up["TAILS"] = many.tails
        combine_types = "results:T extra:F totals:I places:I weights:F y:T programs:i32"
        up_stages = self._tile_stages(many, many.up, 2)
        down_stages = self._tile_stages(many, many.down, 1)
        return {
            ("place", many.rows): self._kernel("routing_kernels", "place", types, placing, 4),
            ("many_up", many): self._kernel("many_kernels", "many_up", up_types, up, many.up.warps, up_stages),
            ("many_down", many): self._kernel(
                "many_kernels", "many_down", down_types, down, many.down.warps, down_stages
            ),
            ("many_combine", many): self._kernel("many_kernels", "many_combine", combine_types, combine, 4),
        }

    def _tile_stages(self, many: Many, tile: Tile, products: int) -> int:
        stage = 2 * tile.columns * (many.rows + products * tile.outputs)
        kept = 2 * many.rows * tile.outputs  # results on their way to memory
        return max(1, min(tile.stages, (shared_memory(self.sm) // tile.programs - kept - 2048) // stage))

    def _combine(self) -> Kernel:
        constants = {"HIDDEN": self.sizes.hidden, "TOP_K": self.sizes.top_k, "H_BLOCK": _COMBINED_COLUMNS}
        types = "results:F chosen:I weights:F y:T tokens:i32 parts:i32 part_rows:i32"
        return self._kernel("few_kernels", "few_combine", types, constants, 4)

    def _stages(self, wanted: int, stage: int, kept: int = 0) -> int:
        """As many stages as wanted and as fit beside ``kept`` bytes."""
        return max(1, min(wanted, (shared_memory(self.sm) - kept - 2048) // stage))


def tactics(op: str, attributes: Mapping[str, Any], dims: Dims, dtype: str, sm: int) -> tuple[MoETactic, ...]:
    """Of ``dims`` all but the tokens have to be known. None for float32, and for rows of weights that are no multiple of 16
    bytes, which the copy engine needs."""
    (_, hidden), (experts, _), (local, _, _), (_, _, intermediate) = dims[:4]
    if dtype not in ("float16", "bfloat16") or hidden % 8 or intermediate % 8:
        return ()
    sizes = Sizes(hidden, intermediate, experts, local, attributes["top_k"], attributes["normalization_mode"])
    few = (Few(16, stages=4), Few(32, stages=4), Few(64))
    # narrow tiles as long as tokens do not fill an expert's; smaller last ones as long as they save much of the work
    narrow_limit, tails_limit = (max(1, rows * experts // sizes.top_k) for rows in (40, 240))
    narrow = Many(narrow_limit, 64, Tile(64, 128, 3, 4), Tile(128, 128, 4, 4))
    whole = Many(0, 128, Tile(128), Tile(256))
    tails = replace(whole, tails=True)
    mixed = MoETactic(
        "mixed", sizes, dtype, sm, One(), few, (narrow, replace(tails, tokens=tails_limit), whole), multiprocessors(sm)
    )
    return (
        mixed,
        replace(mixed, name="whole", many=(narrow, whole)),
        replace(mixed, name="tails", many=(narrow, tails)),
    )
