"""The tactics of every op that has kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moecompiler.plugins.attention import launch as attention
from moecompiler.plugins.attention.cache_op import ATTENTION_SPECS
from moecompiler.plugins.launch import Dims, Tactic
from moecompiler.plugins.moe import launch as moe
from moecompiler.plugins.quantized import linear_launch as quantized_linear
from moecompiler.plugins.quantized import moe_launch as quantized_moe
from moecompiler.plugins.quantized.moe_node import moe_forms
from moecompiler.plugins.rmsnorm import launch as rmsnorm

_OPS = {"RMSNorm": rmsnorm, "AddRMSNorm": rmsnorm, "AllReduceAddRMSNorm": rmsnorm, "MoE": moe, "Attention": attention}
_OPS |= dict.fromkeys((spec.name for spec in ATTENTION_SPECS), attention)
_OPS |= dict.fromkeys(moe_forms(), quantized_moe)
_OPS |= dict.fromkeys((op.replace("MoE", "Linear") for op in moe_forms()), quantized_linear)


def tactics(op: str, attributes: Mapping[str, Any], dims: Dims, dtype: str, sm: int) -> tuple[Tactic, ...]:
    """The ways to compute a node, the best guess first; none where only its body can. See ``launch``."""
    return _OPS[op].tactics(op, attributes, dims, dtype, sm) if op in _OPS else ()
