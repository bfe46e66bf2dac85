"""Plans of ``MoEInt8``, …: few tokens, whose experts' codes are read once, and many tokens, sorted by expert.

Every tactic computes any number of tokens; they differ in tiles and in where they go from few to many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from moecompiler.plugins.launch import AnyKernel, Arena, Dims, Input, Launch, Output, Workspace, multiprocessors
from moecompiler.plugins.moe.compiled import COMBINED_COLUMNS, MOVED_COLUMNS, ROUTED_TOKENS, Key, Step
from moecompiler.plugins.quantized import grouped_codes, grouped_fp8
from moecompiler.plugins.quantized.moe_compiled import (
    ARRANGED_COLUMNS,
    FewTile,
    ManyTile,
    OneTile,
    QuantizedKernels,
)
from moecompiler.plugins.quantized.moe_node import QuantizedNode, Weight, node_of


@dataclass(frozen=True)
class Grouped:
    """For up to ``tokens`` tokens (0: any number) on SM 9.0, in CUDA C++."""

    made: grouped_codes.GroupedCodes | grouped_fp8.GroupedFp8
    tokens: int = 0


Way: TypeAlias = OneTile | FewTile | ManyTile | Grouped


@dataclass(frozen=True)
class QuantizedMoETactic:
    """``ways`` are in ascending order of tokens; the last takes any number."""

    name: str
    node: QuantizedNode
    ways: tuple[Way, ...]

    @property
    def _made(self) -> QuantizedKernels:
        return QuantizedKernels(self.node)

    @cached_property
    def _table(self) -> dict[Key, AnyKernel]:
        made = self._made
        table: dict[Key, AnyKernel] = {("route", ROUTED_TOKENS): made.shared.route(ROUTED_TOKENS)}
        if any(isinstance(way, OneTile | FewTile) for way in self.ways):
            table["route", 1] = made.shared.route(1)
            if made.arranges:
                table["arrange", 0] = made.arrange()
        for way in self.ways:
            match way:
                case Grouped():
                    table.update(way.made.kernels())
                case OneTile():
                    table.update(made.one(way))
                case FewTile():
                    table.update(made.few(way))
                case ManyTile():
                    table.update(made.many(way))
        return table

    @cached_property
    def kernels(self) -> tuple[AnyKernel, ...]:
        return tuple(dict.fromkeys(self._table.values()))

    def workspace(self, dims: Dims) -> int:
        tokens = dims[0][0]
        limits = [way.tokens for way in self.ways[:-1] if way.tokens < tokens]
        return max(self._plan(self._way(count), count)[1] for count in (tokens, *limits))

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        tokens = dims[0][0]
        if not tokens:
            return ()
        steps, _ = self._plan(self._way(tokens), tokens)
        order = {kernel: i for i, kernel in enumerate(self.kernels)}
        overlapped = self._made.shared.overlapped
        return tuple(
            Launch(
                order[self._table[step.kernel]],
                step.grid,
                step.args,
                overlapped and i > 0,
                persistent=step.persistent,
            )
            for i, step in enumerate(steps)
        )

    def _way(self, tokens: int) -> Way:
        return next(way for way in self.ways if tokens <= way.tokens or not way.tokens)

    # what is launched

    def _plan(self, way: Way, tokens: int) -> tuple[list[Step], int]:
        arena, sizes = Arena(), self.node.sizes
        assignments = tokens * sizes.top_k
        chosen, weights = arena.take(4 * assignments), arena.take(4 * assignments)
        block = 1 if isinstance(way, OneTile | FewTile) else ROUTED_TOKENS
        blocks = -(-tokens // block)
        counts = arena.take(4 * blocks * self._made.shared.local_block)
        route_args = (Input(0), Input(1), Input(self.node.expert_ids), chosen, weights, counts, tokens)
        steps = [Step(("route", block), (blocks, 1, 1), route_args)]
        if isinstance(way, OneTile):
            steps += self._one_steps(way, arena, chosen, weights)
        elif isinstance(way, FewTile):
            steps += self._few_steps(way, arena, chosen, weights, tokens)
        elif isinstance(way, Grouped):
            steps += _grouped_steps(way, arena, chosen, weights, counts, tokens)
        else:
            steps += self._many_steps(way, arena, chosen, weights, counts, tokens)
        return steps, arena.size

    def _weight(self, weight: Weight) -> tuple[Input, Input, Input]:
        return Input(weight.codes), Input(weight.scales), Input(weight.extra)

    def _one_steps(self, one: OneTile, arena: Arena, chosen: Workspace, weights: Workspace) -> list[Step]:
        sizes, node = self.node.sizes, self.node
        input_scales, inner_scales = Input(node.gate_up.input_scales), Input(node.down.input_scales)
        steps: list[Step] = []
        x: Input | Workspace = Input(0)
        if node.form.rounds_inputs:
            x, arrange = self._arranged(arena, chosen, 1)
            steps.append(arrange)
        inner = arena.take(2 * sizes.top_k * sizes.intermediate)
        up_args = (x, *self._weight(node.gate_up), input_scales, inner_scales, chosen, inner)
        down_args = (inner, *self._weight(node.down), inner_scales, chosen, weights, Output(0))
        return [
            *steps,
            Step(("one_up", one), (sizes.top_k, -(-sizes.intermediate // one.up_rows), 1), up_args),
            Step(("one_down", one), (-(-sizes.hidden // one.down_rows), 1, 1), down_args),
        ]

    def _arranged(self, arena: Arena, chosen: Workspace, tokens: int) -> tuple[Workspace, Step]:
        sizes, node = self.node.sizes, self.node
        experts = sizes.local if node.form.rounds_inputs else 1
        x = arena.take(2 * experts * tokens * sizes.hidden)
        grid = (tokens, -(-sizes.hidden // ARRANGED_COLUMNS), experts)
        return x, Step(("arrange", 0), grid, (Input(0), Input(node.gate_up.input_scales), chosen, x, tokens))

    def _few_steps(self, few: FewTile, arena: Arena, chosen: Workspace, weights: Workspace, tokens: int) -> list[Step]:
        sizes, node = self.node.sizes, self.node
        hit = min(sizes.local, tokens * sizes.top_k)
        input_scales, inner_scales = Input(node.gate_up.input_scales), Input(node.down.input_scales)
        steps: list[Step] = []
        x: Input | Workspace = Input(0)
        if self._made.arranges:
            x, arrange = self._arranged(arena, chosen, tokens)
            steps.append(arrange)
        inner = arena.take(2 * sizes.local * tokens * sizes.intermediate)
        results = arena.take(4 * few.parts * sizes.local * tokens * sizes.hidden)
        up_args = (x, *self._weight(node.gate_up), input_scales, inner_scales, chosen, inner, tokens)
        down_args = (inner, *self._weight(node.down), inner_scales, chosen, results, tokens)
        combine_args = (results, chosen, weights, Output(0), tokens, few.parts, sizes.local * tokens)
        return [
            *steps,
            Step(("few_up", few), (-(-sizes.intermediate // few.rows), hit, 1), up_args),
            Step(("few_down", few), (-(-sizes.hidden // few.rows), hit, few.parts), down_args),
            Step(("few_combine",), (tokens, -(-sizes.hidden // COMBINED_COLUMNS), 1), combine_args),
        ]

    def _many_steps(
        self, many: ManyTile, arena: Arena, chosen: Workspace, weights: Workspace, counts: Workspace, tokens: int
    ) -> list[Step]:
        sizes, node = self.node.sizes, self.node
        row_tiles = min(-(-tokens * sizes.top_k // many.rows) + sizes.local, tokens * sizes.top_k)
        rows = row_tiles * many.rows
        input_scales, inner_scales = Input(node.gate_up.input_scales), Input(node.down.input_scales)
        places, totals = arena.take(4 * tokens * sizes.top_k), arena.take(4 * self._made.shared.local_block)
        sorted_x = arena.take(2 * rows * sizes.hidden)
        blocks = -(-tokens // ROUTED_TOKENS)
        place_args = (Input(0), chosen, counts, places, totals, sorted_x, tokens, blocks)
        steps = [Step(("place", many.rows), (blocks, -(-sizes.hidden // MOVED_COLUMNS), 1), place_args)]
        x = sorted_x
        if self._made.arranges:
            x = arena.take(2 * rows * sizes.hidden)
            arranged_grid = (rows, -(-sizes.hidden // ARRANGED_COLUMNS), 1)
            steps.append(Step(("arrange", many.rows), arranged_grid, (sorted_x, input_scales, totals, x, rows)))
        inner, results = arena.take(2 * rows * sizes.intermediate), arena.take(2 * rows * sizes.hidden)
        up_args = (x, *self._weight(node.gate_up), input_scales, inner_scales, totals, inner)
        down_args = (inner, *self._weight(node.down), inner_scales, totals, results)
        combine_args = (results, places, weights, Output(0))
        return [
            *steps,
            Step(("many_up", many), (row_tiles, -(-sizes.intermediate // many.outputs), 1), up_args),
            Step(("many_down", many), (row_tiles, -(-sizes.hidden // many.outputs), 1), down_args),
            Step(("sorted_combine",), (tokens, -(-sizes.hidden // COMBINED_COLUMNS), 1), combine_args),
        ]


def _grouped_steps(
    way: Grouped, arena: Arena, chosen: Workspace, weights: Workspace, counts: Workspace, tokens: int
) -> list[Step]:
    if isinstance(way.made, grouped_fp8.GroupedFp8):
        return way.made.steps(arena, grouped_fp8.Routed(chosen, weights, counts), tokens)
    return way.made.steps(arena, chosen, weights, counts, tokens)


def tactics(op: str, attributes: Mapping[str, Any], dims: Dims, dtype: str, sm: int) -> tuple[QuantizedMoETactic, ...]:
    """See ``moe_node.node_of`` for ``dims``, of which all but the tokens have to be known, and for what has no tactics."""
    node = node_of(op, attributes, dims, dtype, sm)
    if node is None:
        return ()
    columns = 256 if node.halves else 128
    parts = _parts(node, 32)
    found: dict[str, tuple[Way, ...]]
    eight, sixteen = (FewTile(tokens, columns=columns, parts=parts) for tokens in (8, 16))
    shallow = replace(eight, stages=3)  # more programs at a time, each with less on its way
    thin = replace(eight, rows=16, warps=1, parts=_parts(node, 16))
    ones = (OneTile(4), OneTile(4, 4, 2048, 4)) if node.halves else (OneTile(), OneTile(2, 2, 2048, 4))
    grouped = _grouped(node)
    if grouped:
        # TensorRT times tactics with ids of experts that are all the same, where little of the work is done: those that were
        # slower with real ones are not offered, and what differs is for one token only
        few: tuple[Way, ...] = (thin,)
        first: tuple[Way, ...] = ones
        if node.codes == "int4" and not node.form.asymmetric:
            first = (
                FewTile(1, 64, columns, 3, 4, _parts(node, 64, 6)),
                FewTile(1, 16, 2 * columns, 3, 1, _parts(node, 16, 15)),
            )
            few = (eight, replace(sixteen, columns=2 * columns, stages=3, parts=min(2, parts)))
        elif node.codes == "int4":
            few = (eight, sixteen)
        found = {name: (one, *few, *grouped) for name, one in zip(("narrow", "wide"), first, strict=True)}
    else:
        more = (FewTile(32, rows=64, columns=128, warps=4), FewTile(64, rows=64, columns=128, warps=4))
        many = (ManyTile(1024, 64), ManyTile(0, 128, 64, 64, 3, 8))
        found = {
            "narrow": (ones[0], eight, sixteen, *more, *many),
            "shallow": (ones[1], shallow, sixteen, *many),
            "thin": (ones[0], thin, sixteen, *many),
        }
    return tuple(QuantizedMoETactic(name, node, ways) for name, ways in found.items())


def _grouped(node: QuantizedNode) -> tuple[Grouped, ...]:
    """For many tokens on SM 9.0, if there are kernels for the node."""
    sizes, processors = node.sizes, multiprocessors(node.sm)
    if node.form.rounds_inputs:
        fits = grouped_fp8.fits((sizes.hidden, sizes.intermediate), node.dtype, node.sm, sizes.local)
        return (Grouped(grouped_fp8.GroupedFp8(sizes, node.dtype, processors)),) if fits else ()
    return (Grouped(grouped_codes.GroupedCodes(node, processors)),) if grouped_codes.moe_fits(node) else ()


def _parts(node: QuantizedNode, rows: int, each: int = 4) -> int:
    """How many programs share a sum of the down product, so that one token's programs are ``each`` times the multiprocessors."""
    programs = -(-node.sizes.hidden // rows) * node.sizes.top_k
    wanted = -(-each * multiprocessors(node.sm) // programs)
    return max(1, min(8, wanted, node.sizes.intermediate // 1024))
