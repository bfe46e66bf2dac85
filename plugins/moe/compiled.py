"""The kernels of a MoE node: their signatures, constants, warps and stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecompiler.config import SPARSE_MIXER_EPSILON
from moecompiler.plugins.launch import TRITON_TYPES, AnyKernel, CudaKernel, Kernel, power_of_two, shared_memory
from moecompiler.plugins.moe.tiles import Few, Many, One, Sizes, Tile

_MODULE = "moecompiler.plugins.moe"
ROUTED_TOKENS = 16
"""Per program of routing, where there are many."""
MOVED_COLUMNS = 512
"""Per program of sorting."""
COMBINED_COLUMNS = 1024
"""Per program of the weighted sum."""

Key = tuple[Any, ...]
"""A kernel's function and the tiles it is compiled for."""


@dataclass(frozen=True)
class Step:
    """A launch whose grid and numbers are known; ``kernel`` is by key."""

    kernel: Key
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    persistent: bool = False


@dataclass(frozen=True)
class NodeKernels:
    """The kernels for a node's sizes, on cards of compute capability ``sm``."""

    sizes: Sizes
    dtype: str
    sm: int

    @property
    def overlapped(self) -> bool:
        """Whether a launch may begin while the one before it ends: from compute capability 9.0 on."""
        return self.sm >= 90

    @property
    def local_block(self) -> int:
        """The power of two that holds the local experts."""
        return max(2, power_of_two(self.sizes.local))

    def _kernel(
        self, file: str, function: str, types: str, constants: Mapping[str, Any], warps: int, stages: int = 1
    ) -> Kernel:
        """``types`` lists arguments as ``name:type``, ``T`` standing for a pointer to the node's own type."""
        named = (item.split(":", 1) for item in types.split())
        kinds = {"T": f"*{TRITON_TYPES[self.dtype]}:16", "I": "*i32:16", "F": "*fp32:16", "L": "*i64:16"}
        signature = tuple((name, kinds.get(kind, kind)) for name, kind in named)
        all_constants = (*constants.items(), ("OVERLAPPED", self.overlapped))
        return Kernel(f"{_MODULE}.{file}", function, signature, all_constants, warps, stages)

    def route(self, tokens: int) -> Kernel:
        """``tokens`` per program: 1 for few, which are not counted, or ``ROUTED_TOKENS``."""
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
            "L_BLOCK": self.local_block,
            "K_BLOCK": power_of_two(sizes.top_k),
            "H_BLOCK": 512 if tokens > 1 else max(64, min(power_of_two(sizes.hidden), 32768 // max(2, experts))),
            "T_BLOCK": tokens,
        }
        types = "x:T router:T expert_ids:L chosen:I weights:F counts:I tokens:i32"
        return self._kernel("routing_kernels", "route", types, constants, *((2, 3) if tokens > 1 else (16, 1)))

    def one(self, tiles: One) -> dict[Key, Kernel]:
        """For one token."""
        sizes = self.sizes
        common = {"HIDDEN": sizes.hidden, "INTERMEDIATE": sizes.intermediate}
        up = {**common, "ROWS": tiles.up_rows, "BLOCK": min(tiles.up_block, power_of_two(sizes.hidden))}
        down = {
            **common,
            "TOP_K": sizes.top_k,
            "ROWS": tiles.down_rows,
            "BLOCK": min(tiles.down_block, power_of_two(sizes.intermediate)),
        }
        return {
            ("one_up",): self._kernel("few_kernels", "one_up", "x:T gate_up:T chosen:I inner:T", up, tiles.warps),
            ("one_down",): self._kernel(
                "few_kernels", "one_down", "inner:T down:T chosen:I weights:F y:T", down, tiles.warps
            ),
        }

    def few(self, tiles: Few) -> dict[Key, Kernel]:
        """For few tokens."""
        sizes = self.sizes
        constants = {
            "HIDDEN": sizes.hidden,
            "INTERMEDIATE": sizes.intermediate,
            "LOCAL": sizes.local,
            "L_BLOCK": self.local_block,
            "TOP_K": sizes.top_k,
            "K_BLOCK": power_of_two(sizes.top_k),
            "M": tiles.tokens,
            "N": tiles.rows,
            "K": tiles.columns,
        }
        up_stages = self._stages(tiles.stages, 2 * tiles.columns * (2 * tiles.rows + tiles.tokens))
        down_stages = self._stages(2 * tiles.stages, 2 * tiles.columns * (tiles.rows + tiles.tokens))
        up = self._kernel(
            "few_kernels", "few_up", "x:T gate_up:T chosen:I inner:T tokens:i32", constants, tiles.warps, up_stages
        )
        types = "inner:T down:T chosen:I results:F tokens:i32"
        parts = {**constants, "PARTS": tiles.parts}
        down = self._kernel("few_kernels", "few_down", types, parts, tiles.warps, down_stages)
        return {("few_up", tiles): up, ("few_down", tiles): down}

    def place(self, rows: int) -> Kernel:
        """Every expert's first row is a multiple of ``rows``."""
        sizes = self.sizes
        constants = {
            "HIDDEN": sizes.hidden,
            "TOP_K": sizes.top_k,
            "L_BLOCK": self.local_block,
            "T_BLOCK": ROUTED_TOKENS,
            "A_BLOCK": power_of_two(ROUTED_TOKENS * sizes.top_k),
            "H_BLOCK": MOVED_COLUMNS,
            "M": rows,
        }
        types = "x:T chosen:I counts:I rows:I totals:I sorted_x:T tokens:i32 blocks:i32"
        return self._kernel("routing_kernels", "place", types, constants, 4)

    def grouped(self) -> dict[Key, AnyKernel]:
        """For many tokens on SM 9.0."""
        sizes = self.sizes
        constants = {
            "HIDDEN": sizes.hidden,
            "INTERMEDIATE": sizes.intermediate,
            "LOCAL": sizes.local,
            "ELEMENT_IS_BFLOAT16": self.dtype == "bfloat16",
        }
        maps = (("weights", "tensormap"), ("tokens", "tensormap"))
        signature = (*maps, ("totals", "*i32"), ("results", "*i16"))
        source, shared = f"{_MODULE}/grouped.cu", shared_memory(90)
        return {
            ("place", 1): self.place(1),
            ("grouped_up",): CudaKernel(source, "grouped_up", signature, tuple(constants.items()), 12, shared),
            ("grouped_down",): CudaKernel(source, "grouped_down", signature, tuple(constants.items()), 12, shared),
            ("sorted_combine",): self.sorted_combine(),
        }

    def sorted_combine(self) -> Kernel:
        """For results that lie as ``place`` sorts rows."""
        constants = {"HIDDEN": self.sizes.hidden, "TOP_K": self.sizes.top_k, "H_BLOCK": COMBINED_COLUMNS}
        return self._kernel("many_kernels", "sorted_combine", "results:T places:I weights:F y:T", constants, 4)

    def many(self, tiles: Many) -> dict[Key, Kernel]:
        """For many tokens."""
        sizes = self.sizes
        common = {
            "HIDDEN": sizes.hidden,
            "INTERMEDIATE": sizes.intermediate,
            "LOCAL": sizes.local,
            "L_BLOCK": self.local_block,
            "M": tiles.rows,
        }
        up, down = ({**common, "N": tile.outputs, "K": tile.columns} for tile in (tiles.up, tiles.down))
        combine = {name: down[name] for name in ("HIDDEN", "L_BLOCK", "M", "N")}
        combine |= {"TOP_K": sizes.top_k, "H_BLOCK": COMBINED_COLUMNS}
        up_types = "sorted_x:T gate_up:T totals:I inner:T rows:i32"
        down_types = "inner:T down:T totals:I results:T extra:F rows:i32"
        up["TAILS"] = tiles.tails
        combine_types = "results:T extra:F totals:I places:I weights:F y:T programs:i32"
        up_stages = self._tile_stages(tiles, tiles.up, 2)
        down_stages = self._tile_stages(tiles, tiles.down, 1)
        return {
            ("place", tiles.rows): self.place(tiles.rows),
            ("many_up", tiles): self._kernel("many_kernels", "many_up", up_types, up, tiles.up.warps, up_stages),
            ("many_down", tiles): self._kernel(
                "many_kernels", "many_down", down_types, down, tiles.down.warps, down_stages
            ),
            ("many_combine", tiles): self._kernel("many_kernels", "many_combine", combine_types, combine, 4),
        }

    def _tile_stages(self, many: Many, tile: Tile, products: int) -> int:
        stage = 2 * tile.columns * (many.rows + products * tile.outputs)
        kept = 2 * many.rows * tile.outputs  # results on their way to memory
        return max(1, min(tile.stages, (shared_memory(self.sm) // tile.programs - kept - 2048) // stage))

    def combine(self) -> Kernel:
        """For few tokens, of any tiles."""
        constants = {"HIDDEN": self.sizes.hidden, "TOP_K": self.sizes.top_k, "H_BLOCK": COMBINED_COLUMNS}
        types = "results:F chosen:I weights:F y:T tokens:i32 parts:i32 part_rows:i32"
        return self._kernel("few_kernels", "few_combine", types, constants, 4)

    def _stages(self, wanted: int, stage: int, kept: int = 0) -> int:
        """As many stages as wanted and as fit beside ``kept`` bytes."""
        return max(1, min(wanted, (shared_memory(self.sm) - kept - 2048) // stage))
