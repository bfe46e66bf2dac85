"""Products with many rows on SM 9.0 where experts' weights are codes of 8 or 4 bits and tokens floats (``grouped_codes.cu``).

Codes come as INT8 bytes, as they are in the graph: what is moved is tokens' columns (``position_of``), when rows are sorted and
when the up product writes what it makes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moecompiler.plugins.launch import (
    TRITON_TYPES,
    AnyKernel,
    Arena,
    CudaKernel,
    Dims,
    Input,
    Kernel,
    Launch,
    Output,
    TensorMap,
    Workspace,
    multiprocessors,
    shared_memory,
)
from moecompiler.plugins.moe.compiled import COMBINED_COLUMNS, ROUTED_TOKENS, Key, NodeKernels, Step
from moecompiler.plugins.moe.tiles import Sizes
from moecompiler.plugins.quantized.dequantize import Form
from moecompiler.plugins.quantized.grouped import MOST_EXPERTS, SM, down_codes, place_rows
from moecompiler.plugins.quantized.moe_node import QuantizedNode
from moecompiler.quantization.schemes import NVFP4_BLOCK, Format

_SEGMENT = 64
_ARRANGED_COLUMNS = 2048
"""Per program of arranging."""
_CODES = {Format.INT8: "INT8", Format.INT4: "INT4", Format.UINT4: "INT4_ASYMMETRIC", Format.E2M1: "E2M1"}


def position_of(column: int, two_in_a_byte: bool) -> int:
    """Where a column stands in what products take: in its 32 columns, or with codes of 8 bits in its 16."""
    if two_in_a_byte:
        return column // 32 * 32 + column % 4 * 8 + column % 32 // 4
    return column // 16 * 16 + column // 2 % 2 * 8 + column % 16 // 4 * 2 + column % 2


def fits(form: Form, block: int, columns: tuple[int, ...], outputs: tuple[int, ...], dtype: str, sm: int) -> bool:
    """Whether there are kernels for rows of so many ``columns`` that make so many ``outputs``: columns are taken 64 at a time,
    which have a scale in common; results are written in 16 bytes."""
    known = form.format in _CODES and not form.ordered and sm == SM and dtype in ("float16", "bfloat16")
    blocks = block == 0 or (form.format is Format.E2M1 and block == NVFP4_BLOCK) or block % _SEGMENT == 0
    whole = all(count % _SEGMENT == 0 and (block == 0 or count % block == 0) for count in columns)
    return known and blocks and whole and all(count % 8 == 0 for count in outputs)


def _product(function: str, form: Form, block: int, dtype: str, constants: dict[str, int]) -> CudaKernel:
    signature = (
        ("codes", "tensormap"),
        ("tokens", "tensormap"),
        ("totals", "*i32"),
        ("scales", "*i8"),
        ("extra", "*i8"),
        ("results", "*i16"),
    )
    macros: tuple[tuple[str, Any], ...] = (
        *constants.items(),
        ("CODES", _CODES[form.format]),
        ("BLOCK", block),
        ("ELEMENT_IS_BFLOAT16", dtype == "bfloat16"),
    )
    source = "moecompiler.plugins.quantized/grouped_codes.cu"
    return CudaKernel(source, function, signature, macros, 12, shared_memory(SM))


def _arrange(function: str, form: Form, dtype: str, types: str, constants: dict[str, int]) -> Kernel:
    kinds = {"T": f"*{TRITON_TYPES[dtype]}:16", "I": "*i32:16", "i32": "i32"}
    named = (item.split(":") for item in types.split())
    signature = tuple((name, kinds[kind]) for name, kind in named)
    all_constants = (*constants.items(), ("TWO_IN_A_BYTE", _two_in_a_byte(form)), ("OVERLAPPED", True))
    return Kernel("moecompiler.plugins.quantized.arrange_kernels", function, signature, all_constants, 4, 1)


def _two_in_a_byte(form: Form) -> bool:
    return form.format is not Format.INT8


def _row_bytes(form: Form, columns: int) -> int:
    return columns // 2 if _two_in_a_byte(form) else columns


def _tokens(base: Workspace, dtype: str, rows: int, columns: int) -> TensorMap:
    return TensorMap(base, dtype, (rows, columns), (columns,), (32, _SEGMENT))


@dataclass(frozen=True)
class GroupedCodes:
    """A node over integer or E2M1 codes, after routing, for any number of tokens. See ``moe_fits``."""

    node: QuantizedNode
    processors: int

    @cached_property
    def _moe(self) -> NodeKernels:
        return NodeKernels(self.node.sizes, self.node.dtype, SM)

    def kernels(self) -> dict[Key, AnyKernel]:
        node, sizes = self.node, self.node.sizes
        constants = {"HIDDEN": sizes.hidden, "INTERMEDIATE": sizes.intermediate, "LOCAL": sizes.local}
        arrange = {"HIDDEN": sizes.hidden, "TOP_K": sizes.top_k, "H_BLOCK": _ARRANGED_COLUMNS}
        up, down = (
            _product(f"grouped_codes_{which}", node.form, node.block, node.dtype, constants) for which in ("up", "down")
        )
        return {
            ("codes_places",): place_rows(sizes, node.dtype),
            ("arrange_sorted",): _arrange("arrange_sorted", node.form, node.dtype, "x:T places:I sorted_x:T", arrange),
            ("grouped_codes_up",): up,
            ("grouped_codes_down",): down,
            ("sorted_combine",): self._moe.sorted_combine(),
        }

    def steps(self, arena: Arena, chosen: Workspace, weights: Workspace, counts: Workspace, tokens: int) -> list[Step]:
        """The launches behind ``route``, which has counted ``ROUTED_TOKENS`` tokens a program and written these three."""
        node, sizes = self.node, self.node.sizes
        hidden, intermediate, local = sizes.hidden, sizes.intermediate, sizes.local
        rows, blocks = tokens * sizes.top_k, -(-tokens // ROUTED_TOKENS)
        places, totals = arena.take(4 * rows), arena.take(4 * self._moe.local_block)
        sorted_x, inner, results = (arena.take(2 * rows * columns) for columns in (hidden, intermediate, hidden))
        width = _row_bytes(node.form, hidden)
        pairs = (local, intermediate // 8, 2, 8, width)  # 8 rows of gate and 8 of up
        pair_strides = (2 * intermediate * width, 8 * width, intermediate * width, width)
        gate_up = TensorMap(Input(node.gate_up.codes), "int8", pairs, pair_strides, (1, 8, 2, 8, 128))
        down = down_codes(Input(node.down.codes), local, hidden, _row_bytes(node.form, intermediate))
        up_rows = _tokens(sorted_x, node.dtype, rows, hidden)
        down_rows = _tokens(inner, node.dtype, rows, intermediate)
        up_scales, down_scales = ((Input(each.scales), Input(each.extra)) for each in (node.gate_up, node.down))
        programs = (self.processors, 1, 1)
        place_args = (Input(0), chosen, counts, places, totals, sorted_x, tokens, blocks)
        arranged_grid = (tokens, -(-hidden // _ARRANGED_COLUMNS), 1)
        combined_grid = (tokens, -(-hidden // COMBINED_COLUMNS), 1)
        return [
            Step(("codes_places",), (blocks, 1, 1), place_args),
            Step(("arrange_sorted",), arranged_grid, (Input(0), places, sorted_x)),
            Step(("grouped_codes_up",), programs, (gate_up, up_rows, totals, *up_scales, inner), True),
            Step(("grouped_codes_down",), programs, (down, down_rows, totals, *down_scales, results), True),
            Step(("sorted_combine",), combined_grid, (results, places, weights, Output(0))),
        ]


@dataclass(frozen=True)
class GroupedCodesTactic:
    """A node by these kernels alone, from routing on, whatever the number of tokens."""

    name: str
    grouped: GroupedCodes

    @property
    def _sizes(self) -> Sizes:
        return self.grouped.node.sizes

    @cached_property
    def _table(self) -> dict[Key, AnyKernel]:
        route = NodeKernels(self._sizes, self.grouped.node.dtype, SM).route(ROUTED_TOKENS)
        return {("route", ROUTED_TOKENS): route, **self.grouped.kernels()}

    @property
    def kernels(self) -> tuple[AnyKernel, ...]:
        return tuple(self._table.values())

    def workspace(self, dims: Dims) -> int:
        return self._plan(dims[0][0])[1]

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        tokens = dims[0][0]
        return _launches(self._plan(tokens)[0], tuple(self._table)) if tokens else ()

    def _plan(self, tokens: int) -> tuple[list[Step], int]:
        arena, node = Arena(), self.grouped.node
        blocks = -(-tokens // ROUTED_TOKENS)
        counted = 4 * blocks * NodeKernels(self._sizes, node.dtype, SM).local_block
        chosen, weights = (arena.take(4 * tokens * self._sizes.top_k) for _ in range(2))
        counts = arena.take(counted)
        args = (Input(0), Input(1), Input(node.expert_ids), chosen, weights, counts, tokens)
        route = Step(("route", ROUTED_TOKENS), (blocks, 1, 1), args)
        return [route, *self.grouped.steps(arena, chosen, weights, counts, tokens)], arena.size


@dataclass(frozen=True)
class LinearCodesTactic:
    """``[..., columns]`` → ``[..., rows]``, as one expert that all tokens go to. Inputs: x, codes, scales and, where the form has
    them, zero points or global scales."""

    name: str
    form: Form
    block: int
    rows: int
    columns: int
    dtype: str
    processors: int

    @cached_property
    def kernels(self) -> tuple[AnyKernel, ...]:
        constants = {"HIDDEN": self.rows, "INTERMEDIATE": self.columns, "LOCAL": 1}
        arrange = {"COLUMNS": self.columns, "BLOCK": _ARRANGED_COLUMNS}
        types = "x:T arranged_x:T totals:I tokens:i32"
        return (
            _arrange("arrange_rows", self.form, self.dtype, types, arrange),
            _product("linear_codes", self.form, self.block, self.dtype, constants),
        )

    def workspace(self, dims: Dims) -> int:
        arena = Arena()
        arena.take(2 * math.prod(dims[0][:-1]) * self.columns)
        arena.take(4)
        return arena.size

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        tokens = math.prod(dims[0][:-1])
        if not tokens:
            return ()
        arena = Arena()
        arranged_x, totals = arena.take(2 * tokens * self.columns), arena.take(4)
        weights = down_codes(Input(1), 1, self.rows, _row_bytes(self.form, self.columns))
        x = _tokens(arranged_x, self.dtype, tokens, self.columns)
        extra = Input(3 if self.form.asymmetric or self.form.two_level else 2)
        grid = (tokens, -(-self.columns // _ARRANGED_COLUMNS), 1)
        steps = [
            Step((0,), grid, (Input(0), arranged_x, totals, tokens)),
            Step((1,), (self.processors, 1, 1), (weights, x, totals, Input(2), extra, Output(0)), True),
        ]
        return _launches(steps, ((0,), (1,)))


def _launches(steps: list[Step], order: tuple[Key, ...]) -> tuple[Launch, ...]:
    return tuple(
        Launch(order.index(step.kernel), step.grid, step.args, i > 0, persistent=step.persistent)
        for i, step in enumerate(steps)
    )


def moe_fits(node: QuantizedNode) -> bool:
    """Whether ``GroupedCodes`` can do a node."""
    columns = (node.sizes.hidden, node.sizes.intermediate)
    return node.sizes.local <= MOST_EXPERTS and fits(node.form, node.block, columns, columns, node.dtype, node.sm)


def moe_tactics(node: QuantizedNode) -> tuple[GroupedCodesTactic, ...]:
    """None where there are no kernels."""
    return (
        (GroupedCodesTactic("grouped codes", GroupedCodes(node, multiprocessors(node.sm))),) if moe_fits(node) else ()
    )


def linear_tactics(
    form: Form, block: int, rows: int, columns: int, dtype: str, sm: int
) -> tuple[LinearCodesTactic, ...]:
    """``block``: columns that have a scale in common, 0: all of a row. None where there are no kernels."""
    if not fits(form, block, (columns,), (rows,), dtype, sm):
        return ()
    return (LinearCodesTactic("grouped codes", form, block, rows, columns, dtype, multiprocessors(sm)),)
