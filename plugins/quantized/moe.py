"""``MoEInt8``, …: ``MoE`` over quantized experts; the router is not quantized, and routing is the same."""

from __future__ import annotations

from moecompiler.config import NormalizationMode
from moecompiler.ops import OpSpec, Value
from moecompiler.plugins.moe.op import moe_body
from moecompiler.plugins.quantized.dequantize import Form

# rows of all experts → [experts, rows of one, columns]
_BY_EXPERT = """
    {w}_count = Shape(expert_ids)
    {w}_rest = Constant<value_ints = [-1]>()
    {w}_width = Shape<start = 1>({w}_rows)
    {w}_by_expert = Concat<axis = 0>({w}_count, {w}_rest, {w}_width)
    {w} = Reshape({w}_rows, {w}_by_expert)
"""


def quantized_moe_spec(mode: NormalizationMode, top_k: int, form: Form) -> OpSpec:
    """``gate_up_codes [local experts * 2F, H]`` and ``down_codes [local experts * H, F]`` in place of ``MoE``'s weights."""
    weights = (("gate_up", "gate_up_rows", "hidden"), ("down", "down_rows", "intermediate"))
    return OpSpec(
        name=f"MoE{form.name}",
        inputs=(
            Value("x", ("tokens", "hidden")),
            Value("router", ("experts", "hidden")),
            *(value for weight in weights for value in form.values(*weight)),
            Value("expert_ids", ("local_experts",), "int64"),
        ),
        outputs=(Value("y", ("tokens", "hidden")),),
        attributes={"top_k": int, "normalization_mode": int} | form.attributes,
        body="".join(form.body(name, f"{name}_rows") + _BY_EXPERT.format(w=name) for name, *_ in weights)
        + moe_body(mode, top_k),
        weights=("gate_up", "down"),
    )
