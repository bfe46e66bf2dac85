"""Plans of ``MoE``: one token, few tokens, and many tokens sorted by expert.

Every tactic computes any number of tokens; they differ in tiles and in where they go from few to many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moecompiler.plugins.launch import (
    AnyKernel,
    Arena,
    Dims,
    Input,
    Launch,
    Output,
    TensorMap,
    Workspace,
    multiprocessors,
)
from moecompiler.plugins.moe.compiled import COMBINED_COLUMNS, MOVED_COLUMNS, ROUTED_TOKENS, Key, NodeKernels, Step
from moecompiler.plugins.moe.tiles import Few, Grouped, Many, One, Sizes, Tile


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
    many: tuple[Many | Grouped, ...]
    processors: int

    @property
    def _made(self) -> NodeKernels:
        return NodeKernels(self.sizes, self.dtype, self.sm)

    @cached_property
    def _table(self) -> dict[Key, AnyKernel]:
        made = self._made
        table: dict[Key, AnyKernel] = {("route", ROUTED_TOKENS): made.route(ROUTED_TOKENS)}
        if self.one or self.few:
            table["route", 1] = made.route(1)
        if self.one:
            table.update(made.one(self.one))
        for few in self.few:
            table.update(made.few(few))
        for many in self.many:
            table.update(made.grouped() if isinstance(many, Grouped) else made.many(many))
        if self.few:
            table["few_combine",] = made.combine()
        return table

    @cached_property
    def kernels(self) -> tuple[AnyKernel, ...]:
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
            Launch(
                order[self._table[step.kernel]],
                step.grid,
                step.args,
                self._made.overlapped and i > 0,
                persistent=step.persistent,
            )
            for i, step in enumerate(steps)
        )

    def _way(self, tokens: int) -> One | Few | Many | Grouped:
        if tokens == 1 and self.one:
            return self.one
        few = next((few for few in self.few if tokens <= few.tokens), None)
        return few or next(many for many in self.many if tokens <= many.tokens or not many.tokens)

    # what is launched

    def _plan(self, way: One | Few | Many | Grouped, tokens: int) -> tuple[list[Step], int]:
        arena, sizes = Arena(), self.sizes
        assignments = tokens * sizes.top_k
        chosen, weights = arena.take(4 * assignments), arena.take(4 * assignments)
        block = ROUTED_TOKENS if isinstance(way, (Many, Grouped)) else 1
        blocks = -(-tokens // block)
        counts = arena.take(4 * blocks * self._made.local_block)
        route_args = (Input(0), Input(1), Input(4), chosen, weights, counts, tokens)
        steps = [Step(("route", block), (blocks, 1, 1), route_args)]
        if isinstance(way, One):
            steps += self._one_steps(way, arena, chosen, weights)
        elif isinstance(way, Few):
            steps += self._few_steps(way, arena, chosen, weights, tokens)
        elif isinstance(way, Grouped):
            steps += self._grouped_steps(arena, chosen, weights, counts, tokens)
        else:
            steps += self._many_steps(way, arena, chosen, weights, counts, tokens)
        return steps, arena.size

    def _one_steps(self, one: One, arena: Arena, chosen: Workspace, weights: Workspace) -> list[Step]:
        sizes = self.sizes
        inner = arena.take(2 * sizes.top_k * sizes.intermediate)
        up_grid = (sizes.top_k, -(-sizes.intermediate // one.up_rows), 1)
        down_grid = (-(-sizes.hidden // one.down_rows), 1, 1)
        return [
            Step(("one_up",), up_grid, (Input(0), Input(2), chosen, inner)),
            Step(("one_down",), down_grid, (inner, Input(3), chosen, weights, Output(0))),
        ]

    def _few_steps(self, few: Few, arena: Arena, chosen: Workspace, weights: Workspace, tokens: int) -> list[Step]:
        sizes = self.sizes
        hit = min(sizes.local, tokens * sizes.top_k)
        inner = arena.take(2 * sizes.local * tokens * sizes.intermediate)
        results = arena.take(4 * few.parts * sizes.local * tokens * sizes.hidden)
        up_grid = (-(-sizes.intermediate // few.rows), hit, 1)
        down_grid = (-(-sizes.hidden // few.rows), hit, few.parts)
        return [
            Step(("few_up", few), up_grid, (Input(0), Input(2), chosen, inner, tokens)),
            Step(("few_down", few), down_grid, (inner, Input(3), chosen, results, tokens)),
            Step(
                ("few_combine",),
                (tokens, -(-sizes.hidden // COMBINED_COLUMNS), 1),
                (results, chosen, weights, Output(0), tokens, few.parts, sizes.local * tokens),
            ),
        ]

    def _many_steps(
        self, many: Many, arena: Arena, chosen: Workspace, weights: Workspace, counts: Workspace, tokens: int
    ) -> list[Step]:
        sizes = self.sizes
        routed = tokens * sizes.top_k
        row_tiles = -(-routed // many.rows) + sizes.local
        rows = row_tiles * many.rows
        places = arena.take(4 * tokens * sizes.top_k)
        totals = arena.take(4 * self._made.local_block)
        sorted_x = arena.take(2 * rows * sizes.hidden)
        inner = arena.take(2 * rows * sizes.intermediate)
        results = arena.take(2 * rows * sizes.hidden)
        blocks = -(-tokens // ROUTED_TOKENS)
        place_args = (Input(0), chosen, counts, places, totals, sorted_x, tokens, blocks)
        up_programs = min(many.up.programs * self.processors, row_tiles * -(-sizes.intermediate // many.up.outputs))
        column_tiles = -(-sizes.hidden // many.down.outputs)
        down_programs = min(many.down.programs * self.processors, 8 * row_tiles * column_tiles)
        extra = arena.take(4 * down_programs * many.rows * many.down.outputs)
        return [
            Step(("place", many.rows), (blocks, -(-sizes.hidden // MOVED_COLUMNS), 1), place_args),
            Step(("many_up", many), (up_programs, 1, 1), (sorted_x, Input(2), totals, inner, rows)),
            Step(("many_down", many), (down_programs, 1, 1), (inner, Input(3), totals, results, extra, rows)),
            Step(
                ("many_combine", many),
                (tokens, -(-sizes.hidden // COMBINED_COLUMNS), 1),
                (results, extra, totals, places, weights, Output(0), down_programs),
            ),
        ]

    def _grouped_steps(
        self, arena: Arena, chosen: Workspace, weights: Workspace, counts: Workspace, tokens: int
    ) -> list[Step]:
        sizes = self.sizes
        hidden, intermediate, local = sizes.hidden, sizes.intermediate, sizes.local
        rows = tokens * sizes.top_k
        places, totals = arena.take(4 * tokens * sizes.top_k), arena.take(4 * self._made.local_block)
        sorted_x, inner, results = (arena.take(2 * rows * columns) for columns in (hidden, intermediate, hidden))
        blocks = -(-tokens // ROUTED_TOKENS)
        pairs = (local, intermediate // 8, 2, 8, hidden)  # 8 rows of gate and 8 of up
        pair_strides = (2 * intermediate * hidden, 8 * hidden, intermediate * hidden, hidden)
        gate_up = TensorMap(Input(2), self.dtype, pairs, pair_strides, (1, 8, 2, 8, 64))
        down_sizes, down_strides = (local, hidden, intermediate), (hidden * intermediate, intermediate)
        down = TensorMap(Input(3), self.dtype, down_sizes, down_strides, (1, 128, 64))
        up_rows = TensorMap(sorted_x, self.dtype, (rows, hidden), (hidden,), (32, 64))
        down_rows = TensorMap(inner, self.dtype, (rows, intermediate), (intermediate,), (32, 64))
        programs = (self.processors, 1, 1)
        return [
            Step(
                ("place", 1),
                (blocks, -(-hidden // MOVED_COLUMNS), 1),
                (Input(0), chosen, counts, places, totals, sorted_x, tokens, blocks),
            ),
            Step(("grouped_up",), programs, (gate_up, up_rows, totals, inner), True),
            Step(("grouped_down",), programs, (down, down_rows, totals, results), True),
            Step(
                ("sorted_combine",),
                (tokens, -(-hidden // COMBINED_COLUMNS), 1),
                (results, places, weights, Output(0)),
            ),
        ]


def tactics(op: str, attributes: Mapping[str, Any], dims: Dims, dtype: str, sm: int) -> tuple[MoETactic, ...]:
    """Of ``dims`` all but the tokens have to be known. None for float32, and for rows of weights that are no multiple of 16
    bytes, which the copy engine needs."""
    (_, hidden), (experts, _), (local, _, _), (_, _, intermediate) = dims[:4]
    if dtype not in ("float16", "bfloat16") or hidden % 8 or intermediate % 8:
        return ()
    sizes = Sizes(hidden, intermediate, experts, local, attributes["top_k"], attributes["normalization_mode"])
    few = (Few(16, stages=4), Few(32, stages=4), Few(64))
    common = (sizes, dtype, sm, One())
    if sm == 90 and local <= 64:
        grouped = MoETactic("grouped", *common, few, (Grouped(),), multiprocessors(sm))
        return grouped, replace(grouped, name="grouped early", few=few[:1])
    # narrow tiles as long as tokens do not fill an expert's; smaller last ones as long as they save much of the work
    narrow_limit, tails_limit = (max(1, rows * experts // sizes.top_k) for rows in (40, 240))
    narrow = Many(narrow_limit, 64, Tile(64, 128, 3, 4), Tile(128, 128, 4, 4))
    whole = Many(0, 128, Tile(128), Tile(256))
    tails = replace(whole, tails=True)
    limited = (narrow, replace(tails, tokens=tails_limit), whole)
    mixed = MoETactic("mixed", *common, few, limited, multiprocessors(sm))
    return (
        mixed,
        replace(mixed, name="whole", many=(narrow, whole)),
        replace(mixed, name="tails", many=(narrow, tails)),
    )
