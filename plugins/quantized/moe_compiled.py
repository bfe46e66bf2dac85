"""The kernels of a quantized MoE node beside those of ``moe.compiled``: their tiles, signatures, constants, warps and stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecompiler.plugins.launch import TRITON_TYPES, AnyKernel, Kernel, power_of_two, shared_memory
from moecompiler.plugins.moe.compiled import Key, NodeKernels
from moecompiler.plugins.quantized.moe_node import QuantizedNode

_MODULE = "moecompiler.plugins.quantized"
ARRANGED_COLUMNS = 1024
"""Per program of ``arrange``."""


@dataclass(frozen=True)
class OneTile:
    """For one token: rows of codes of the up product, each for gate and for up, and of the down product; bytes of a row at a
    time, of which twice as many are on their way."""

    up_rows: int = 2
    down_rows: int = 4
    row_bytes: int = 1024
    warps: int = 2
    tokens: int = 1


@dataclass(frozen=True)
class FewTile:
    """For up to ``tokens`` tokens: rows of codes, columns in a turn of a loop; ``parts``: programs that share a sum over F."""

    tokens: int
    rows: int = 32
    columns: int = 128
    stages: int = 4
    warps: int = 2
    parts: int = 1

    @property
    def multiplied(self) -> int:
        """Tokens that a product has room for."""
        return max(8, self.tokens)


@dataclass(frozen=True)
class ManyTile:
    """For up to ``tokens`` tokens (0: any number): ``rows`` of sorted tokens, ``outputs`` rows of codes."""

    tokens: int = 0
    rows: int = 64
    outputs: int = 64
    columns: int = 64
    stages: int = 3
    warps: int = 4


@dataclass(frozen=True)
class QuantizedKernels:
    """The kernels for a node."""

    node: QuantizedNode

    @property
    def shared(self) -> NodeKernels:
        """Those that any MoE node has: routing, sorting, combination."""
        return NodeKernels(self.node.sizes, self.node.dtype, self.node.sm)

    @property
    def arranges(self) -> bool:
        """Whether x is not what products take as it is."""
        return self.node.codes != "int8"

    @property
    def _types(self) -> dict[str, str]:
        """Of arguments: T the node's own floats, V what products meet, S scales, E their extra."""
        floats = f"*{TRITON_TYPES[self.node.dtype]}:16"
        form = self.node.form
        extra = "*i8:16" if form.asymmetric else "*fp32:16" if form.two_level else floats
        values = "*fp16:16" if form.rounds_inputs else floats
        bytes_ = "*i8:16"
        scales = bytes_ if form.two_level else floats
        return {"T": floats, "V": values, "C": bytes_, "S": scales, "E": extra, "I": "*i32:16", "F": "*fp32:16"}

    def _kernel(
        self, file: str, function: str, types: str, constants: Mapping[str, Any], warps: int, stages: int = 1
    ) -> Kernel:
        named = (item.split(":", 1) for item in types.split())
        signature = tuple((name, self._types.get(kind, kind)) for name, kind in named)
        all_constants = (*constants.items(), ("OVERLAPPED", self.shared.overlapped))
        return Kernel(f"{_MODULE}.{file}", function, signature, all_constants, warps, stages)

    def arrange(self, sorted_rows: int = 0) -> Kernel:
        """Of x as it comes, or with each expert's rows beginning at a multiple of ``sorted_rows``."""
        constants = {
            "HIDDEN": self.node.sizes.hidden,
            "HALVES": self.node.halves,
            "ROUNDED": self.node.form.rounds_inputs,
            "SORTED": sorted_rows > 0,
            "L_BLOCK": self.shared.local_block,
            "M": sorted_rows,
            "H_BLOCK": ARRANGED_COLUMNS,
        }
        types = "x:T input_scales:T totals:I arranged:V tokens:i32"
        return self._kernel("few_kernels", "arrange", types, constants, 4)

    def one(self, tile: OneTile) -> dict[Key, AnyKernel]:
        """For one token."""
        sizes = self.node.sizes
        common = {"HIDDEN": sizes.hidden, "INTERMEDIATE": sizes.intermediate}
        up = common | {"ROWS": tile.up_rows} | self._vector(tile, sizes.hidden)
        down = common | {"TOP_K": sizes.top_k, "ROWS": tile.down_rows} | self._vector(tile, sizes.intermediate)
        up_types = "x:V codes:C scales:S extra:E input_scales:T inner_scales:T chosen:I inner:V"
        down_types = "inner:V codes:C scales:S extra:E inner_scales:T chosen:I weights:F y:T"
        up_kernel = self._kernel("one_kernels", "one_up", self._for_scales(up_types), up, tile.warps)
        down_kernel = self._kernel("one_kernels", "one_down", self._for_scales(down_types), down, tile.warps)
        return {("one_up", tile): up_kernel, ("one_down", tile): down_kernel}

    def few(self, tile: FewTile) -> dict[Key, AnyKernel]:
        """For few tokens; their results are to be combined."""
        sizes = self.node.sizes
        constants = {
            "HIDDEN": sizes.hidden,
            "INTERMEDIATE": sizes.intermediate,
            "LOCAL": sizes.local,
            "L_BLOCK": self.shared.local_block,
            "TOP_K": sizes.top_k,
            "K_BLOCK": power_of_two(sizes.top_k),
            "M": tile.multiplied,
            "N": tile.rows,
        }
        up_types = "x:V codes:C scales:S extra:E input_scales:T inner_scales:T chosen:I inner:V tokens:i32"
        down_types = "inner:V codes:C scales:S extra:E inner_scales:T chosen:I results:F tokens:i32"
        up, down = constants | self._product(tile.columns), constants | self._product(tile.columns)
        stages = [self._stages(tile, tile.multiplied, products * tile.rows) for products in (2, 1)]
        up_kernel = self._kernel("few_kernels", "few_up", self._for_scales(up_types), up, tile.warps, stages[0])
        down["PARTS"] = tile.parts
        down_kernel = self._kernel("few_kernels", "few_down", self._for_scales(down_types), down, tile.warps, stages[1])
        return {("few_up", tile): up_kernel, ("few_down", tile): down_kernel, ("few_combine",): self.shared.combine()}

    def many(self, tile: ManyTile) -> dict[Key, AnyKernel]:
        """For many tokens."""
        sizes = self.node.sizes
        constants = {
            "HIDDEN": sizes.hidden,
            "INTERMEDIATE": sizes.intermediate,
            "L_BLOCK": self.shared.local_block,
            "M": tile.rows,
            "N": tile.outputs,
        } | self._product(tile.columns)
        up_types = "x:V codes:C scales:S extra:E input_scales:T inner_scales:T totals:I inner:V"
        down_types = "inner:V codes:C scales:S extra:E inner_scales:T totals:I results:T"
        stages = [self._stages(tile, tile.rows, products * tile.outputs) for products in (2, 1)]
        up = self._kernel("many_kernels", "many_up", self._for_scales(up_types), constants, tile.warps, stages[0])
        down = self._kernel("many_kernels", "many_down", self._for_scales(down_types), constants, tile.warps, stages[1])
        made: dict[Key, AnyKernel] = {
            ("place", tile.rows): self.shared.place(tile.rows),
            ("many_up", tile): up,
            ("many_down", tile): down,
            ("sorted_combine",): self.shared.sorted_combine(),
        }
        return made | ({("arrange", tile.rows): self.arrange(tile.rows)} if self.arranges else {})

    def _for_scales(self, types: str) -> str:
        """Where there are no scales of inputs, those of codes are given in their place."""
        kind = "T" if self.node.form.rounds_inputs else "S"
        return types.replace("input_scales:T", f"input_scales:{kind}").replace("inner_scales:T", f"inner_scales:{kind}")

    def _product(self, columns: int) -> dict[str, Any]:
        """How ``products.row_products`` goes through a row: ``columns`` in a turn; of these, as many are multiplied at a time as
        have scales in common."""
        block, codes = self.node.block, self.node.codes
        at_once = columns
        if codes == "int4" and block and block % 32 == 0:
            at_once = min(columns, block & -block)
        return {
            "K": at_once,
            "STEPS": columns // at_once,
            "BLOCK": block,
            "CODES": codes,
            "ASYMMETRIC": self.node.form.asymmetric,
            "FAST": True,
            "NATIVE": self.node.sm >= 89,
        }

    def _vector(self, tile: OneTile, width: int) -> dict[str, Any]:
        """How ``one_kernels.vector_products`` goes through rows of ``width`` columns."""
        group = self.node.block or 128
        held = power_of_two(group // 4)
        wanted = max(1, tile.row_bytes // (2 * held))
        return {
            "BLOCK": self.node.block,
            "GROUP": group,
            "GROUPS": min(wanted, power_of_two(-(-width // group))),
            "QUADS": held,
            "COLUMNS": min(tile.row_bytes, power_of_two(width)),
            "CODES": self.node.codes,
            "ASYMMETRIC": self.node.form.asymmetric,
            "FAST": True,
            "NATIVE": self.node.sm >= 89,
        }

    def _stages(self, tile: FewTile | ManyTile, tokens: int, rows: int) -> int:
        """As many as wanted and as leave a multiprocessor's shared memory to several programs."""
        stage = tile.columns * 2 * tokens + self.node.columns_bytes(tile.columns) * rows
        room = shared_memory(self.node.sm) // (4 if isinstance(tile, FewTile) else 2) - 2048
        return max(2, min(tile.stages, room // stage))
