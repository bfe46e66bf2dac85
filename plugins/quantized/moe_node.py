"""A quantized MoE node: what its op's name, attributes and inputs' shapes say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecompiler.plugins.launch import Dims
from moecompiler.plugins.moe.tiles import Sizes
from moecompiler.plugins.quantized.dequantize import Form, forms
from moecompiler.quantization.schemes import NVFP4_BLOCK, Format

_CODES = {Format.INT8: "int8", Format.INT4: "int4", Format.UINT4: "int4", Format.E4M3: "e4m3", Format.E2M1: "e2m1"}


@dataclass(frozen=True)
class Weight:
    """Which inputs of a node stand for a weight. ``extra``: its zero points or global scales, the scales again if there are
    none; ``input_scales``: of what meets it, the scales again if there are none."""

    codes: int
    scales: int
    extra: int
    input_scales: int


@dataclass(frozen=True)
class QuantizedNode:
    """``block``: columns that have a scale in common, 0: all of a row; ``dtype``: of the node's floats."""

    form: Form
    sizes: Sizes
    dtype: str
    sm: int
    block: int
    gate_up: Weight
    down: Weight
    expert_ids: int

    @property
    def codes(self) -> str:
        """As the kernels name the format."""
        return _CODES[self.form.format]

    @property
    def halves(self) -> bool:
        """Whether a byte has two codes."""
        return self.codes in ("int4", "e2m1")

    def columns_bytes(self, columns: int) -> int:
        """Of so many codes of a row."""
        return columns // 2 if self.halves else columns


def moe_forms() -> dict[str, Form]:
    """By op, those that kernels can do. In act-order a group's features come from all over the row: bodies do these."""
    return {f"MoE{form.name}": form for form in forms() if not form.ordered}


def node_of(op: str, attributes: Mapping[str, Any], dims: Dims, dtype: str, sm: int) -> QuantizedNode | None:
    """``dims`` are of the inputs as the graph has them. None where there are no kernels: for float32, GPUs before compute
    capability 8.0, rows of codes that are no multiple of 16 bytes, and blocks of another size than multiples of 16."""
    form = moe_forms()[op]
    parts = 3 if form.asymmetric or form.two_level else 2
    (local,), (experts, hidden) = dims[-1], dims[1]
    intermediate = dims[2][0] // (2 * local)
    block = (NVFP4_BLOCK if form.two_level else int(attributes["block_size"])) if form.blocks else 0
    last = len(dims) - 1

    def weight(first: int, order: int) -> Weight:
        scales = first + 1
        input_scales = last - 2 + order if form.rounds_inputs else scales
        return Weight(first, scales, first + 2 if parts == 3 else scales, input_scales)

    sizes = Sizes(hidden, intermediate, experts, local, attributes["top_k"], attributes["normalization_mode"])
    node = QuantizedNode(form, sizes, dtype, sm, block, weight(2, 0), weight(2 + parts, 1), last)
    whole_rows = all(node.columns_bytes(columns) % 16 == 0 for columns in (hidden, intermediate))
    even = not node.halves or (hidden % 2 == 0 and intermediate % 2 == 0)
    fits = block % 16 == 0 and (block == 0 or (hidden % block == 0 and intermediate % block == 0))
    if dtype not in ("float16", "bfloat16") or sm < 80 or not (whole_rows and even and fits):
        return None
    return node
