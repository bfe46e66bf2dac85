"""FP8 products with many rows on SM 9.0: an expert's E4M3 weights by its tokens' E4M3 codes (``grouped_fp8.cu``).

Codes come as INT8 bytes. Inputs of ``MoEFp8``: x, router, gate_up codes and scales, down codes and scales, the scales of what
experts get and of what they make of it, expert ids; of ``LinearFp8``: x, codes, scales, the scale of x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
from moecompiler.plugins.quantized.grouped import MOST_EXPERTS, SM, down_codes, place_rows

_SOURCE = "moecompiler.plugins.quantized/grouped_fp8.cu"
_QUANTIZED_COLUMNS = 2048
"""Per program of quantizing."""
PROMOTED = 4
"""Steps of 128 columns that the matrix units add up by themselves, where sums are promoted (DeepSeek-V3, §3.3.2: there one)."""


@dataclass(frozen=True)
class Routed:
    """What the kernel ``route`` has written: ``chosen [T, K]``, ``weights [T, K]``, ``counts [programs, L_BLOCK]``."""

    chosen: Workspace
    weights: Workspace
    counts: Workspace


def fits(columns: tuple[int, ...], dtype: str, sm: int, local: int = 1) -> bool:
    """Whether there are kernels: rows of codes have to be multiples of 16 bytes, which the copy engine needs."""
    aligned = all(count % 16 == 0 for count in columns)
    return sm == SM and dtype in ("float16", "bfloat16") and aligned and local <= MOST_EXPERTS


def _product(function: str, dtype: str, constants: dict[str, Any], pointers: str) -> CudaKernel:
    """``pointers`` are named behind the two tensor maps and the totals."""
    maps = (("weights", "tensormap"), ("tokens", "tensormap"))
    signature = (*maps, ("totals", "*i32"), *((name, "*i16") for name in pointers.split()))
    macros = (*constants.items(), ("ELEMENT_IS_BFLOAT16", dtype == "bfloat16"))
    return CudaKernel(_SOURCE, function, signature, macros, 12, shared_memory(SM))


def _quantize(function: str, dtype: str, types: str, constants: dict[str, Any]) -> Kernel:
    kinds = {"T": f"*{TRITON_TYPES[dtype]}:16", "I": "*i32:16", "B": "*i8:16", "i32": "i32"}
    named = (item.split(":") for item in types.split())
    signature = tuple((name, kinds[kind]) for name, kind in named)
    all_constants = (*constants.items(), ("NATIVE", True), ("OVERLAPPED", True))
    return Kernel("moecompiler.plugins.quantized.quantize_kernels", function, signature, all_constants, 4, 1)


def _rows_of_codes(base: Input | Workspace, rows: int, columns: int) -> TensorMap:
    return TensorMap(base, "int8", (rows, columns), (columns,), (32, 128))


@dataclass(frozen=True)
class GroupedFp8:
    """``MoEFp8`` after routing, for any number of tokens. ``promoted``: 0, or after how many steps sums are promoted."""

    sizes: Sizes
    dtype: str
    processors: int
    promoted: int = PROMOTED

    @cached_property
    def _moe(self) -> NodeKernels:
        return NodeKernels(self.sizes, self.dtype, SM)

    def kernels(self) -> dict[Key, AnyKernel]:
        sizes = self.sizes
        constants = {
            "HIDDEN": sizes.hidden,
            "INTERMEDIATE": sizes.intermediate,
            "LOCAL": sizes.local,
            "PROMOTED": self.promoted,
        }
        quantize = {"HIDDEN": sizes.hidden, "TOP_K": sizes.top_k, "H_BLOCK": _QUANTIZED_COLUMNS}
        up = "scales input_scales output_scales inner"
        return {
            ("fp8_places",): place_rows(sizes, self.dtype),
            ("quantize_sorted",): _quantize(
                "quantize_sorted", self.dtype, "x:T places:I chosen:I scales:T sorted_x:B", quantize
            ),
            ("grouped_fp8_up", self.promoted): _product("grouped_fp8_up", self.dtype, constants, up),
            ("grouped_fp8_down", self.promoted): _product(
                "grouped_fp8_down", self.dtype, constants, "scales input_scales results"
            ),
            ("sorted_combine",): self._moe.sorted_combine(),
        }

    def steps(self, arena: Arena, routed: Routed, tokens: int) -> list[Step]:
        """The launches behind ``route``, which has counted ``ROUTED_TOKENS`` tokens a program."""
        sizes = self.sizes
        hidden, intermediate, local = sizes.hidden, sizes.intermediate, sizes.local
        rows = tokens * sizes.top_k
        blocks = -(-tokens // ROUTED_TOKENS)
        places, totals = arena.take(4 * rows), arena.take(4 * self._moe.local_block)
        sorted_x, inner, results = (
            arena.take(rows * hidden),
            arena.take(rows * intermediate),
            arena.take(2 * rows * hidden),
        )
        pairs = (local, intermediate // 8, 2, 8, hidden)  # 8 rows of gate and 8 of up
        pair_strides = (2 * intermediate * hidden, 8 * hidden, intermediate * hidden, hidden)
        gate_up = TensorMap(Input(2), "int8", pairs, pair_strides, (1, 8, 2, 8, 128))
        down = down_codes(Input(4), local, hidden, intermediate)
        up_rows, down_rows = _rows_of_codes(sorted_x, rows, hidden), _rows_of_codes(inner, rows, intermediate)
        programs = (self.processors, 1, 1)
        return [
            Step(
                ("fp8_places",),
                (blocks, 1, 1),
                (Input(0), routed.chosen, routed.counts, places, totals, sorted_x, tokens, blocks),
            ),
            Step(
                ("quantize_sorted",),
                (tokens, -(-hidden // _QUANTIZED_COLUMNS), 1),
                (Input(0), places, routed.chosen, Input(6), sorted_x),
            ),
            Step(
                ("grouped_fp8_up", self.promoted),
                programs,
                (gate_up, up_rows, totals, Input(3), Input(6), Input(7), inner),
                True,
            ),
            Step(
                ("grouped_fp8_down", self.promoted),
                programs,
                (down, down_rows, totals, Input(5), Input(7), results),
                True,
            ),
            Step(
                ("sorted_combine",),
                (tokens, -(-hidden // COMBINED_COLUMNS), 1),
                (results, places, routed.weights, Output(0)),
            ),
        ]


@dataclass(frozen=True)
class GroupedFp8Tactic:
    """``MoEFp8`` by these kernels alone, from routing on, whatever the number of tokens."""

    name: str
    grouped: GroupedFp8

    @cached_property
    def _table(self) -> dict[Key, AnyKernel]:
        route = NodeKernels(self.grouped.sizes, self.grouped.dtype, SM).route(ROUTED_TOKENS)
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
        arena, sizes = Arena(), self.grouped.sizes
        blocks = -(-tokens // ROUTED_TOKENS)
        counts = 4 * blocks * NodeKernels(sizes, self.grouped.dtype, SM).local_block
        routed = Routed(*(arena.take(size) for size in (4 * tokens * sizes.top_k, 4 * tokens * sizes.top_k, counts)))
        args = (Input(0), Input(1), Input(8), routed.chosen, routed.weights, routed.counts, tokens)
        route = Step(("route", ROUTED_TOKENS), (blocks, 1, 1), args)
        return [route, *self.grouped.steps(arena, routed, tokens)], arena.size


@dataclass(frozen=True)
class LinearFp8Tactic:
    """``LinearFp8 [..., columns]`` → ``[..., rows]``, as one expert that all tokens go to."""

    name: str
    rows: int
    columns: int
    dtype: str
    processors: int
    promoted: int = PROMOTED

    @cached_property
    def kernels(self) -> tuple[AnyKernel, ...]:
        constants = {"HIDDEN": self.rows, "INTERMEDIATE": self.columns, "LOCAL": 1, "PROMOTED": self.promoted}
        quantize = {"COLUMNS": self.columns, "BLOCK": _QUANTIZED_COLUMNS}
        types = "x:T scale:T codes:B totals:I tokens:i32"
        return (
            _quantize("quantize_rows", self.dtype, types, quantize),
            _product("linear_fp8", self.dtype, constants, "scales input_scales y"),
        )

    def workspace(self, dims: Dims) -> int:
        arena = Arena()
        arena.take(math.prod(dims[0][:-1]) * self.columns)
        arena.take(4)
        return arena.size

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        tokens = math.prod(dims[0][:-1])
        if not tokens:
            return ()
        arena = Arena()
        codes, totals = arena.take(tokens * self.columns), arena.take(4)
        weights = down_codes(Input(1), 1, self.rows, self.columns)
        x = _rows_of_codes(codes, tokens, self.columns)
        steps = [
            Step(
                (0,),
                (tokens, -(-self.columns // _QUANTIZED_COLUMNS), 1),
                (Input(0), Input(3), codes, totals, tokens),
            ),
            Step((1,), (self.processors, 1, 1), (weights, x, totals, Input(2), Input(3), Output(0)), True),
        ]
        return _launches(steps, ((0,), (1,)))


def _launches(steps: list[Step], order: tuple[Key, ...]) -> tuple[Launch, ...]:
    return tuple(
        Launch(order.index(step.kernel), step.grid, step.args, i > 0, persistent=step.persistent)
        for i, step in enumerate(steps)
    )


def moe_tactics(sizes: Sizes, dtype: str, sm: int) -> tuple[GroupedFp8Tactic, ...]:
    """None where there are no kernels."""
    if not fits((sizes.hidden, sizes.intermediate), dtype, sm, sizes.local):
        return ()
    grouped = GroupedFp8(sizes, dtype, multiprocessors(sm))
    return (
        GroupedFp8Tactic("grouped fp8", replace(grouped, promoted=0)),
        GroupedFp8Tactic("grouped fp8 promoted", grouped),
    )


def linear_tactics(rows: int, columns: int, dtype: str, sm: int) -> tuple[LinearFp8Tactic, ...]:
    """None where there are no kernels."""
    if not fits((rows, columns), dtype, sm):
        return ()
    promoted = LinearFp8Tactic("grouped fp8 promoted", rows, columns, dtype, multiprocessors(sm))
    return replace(promoted, name="grouped fp8", promoted=0), promoted
