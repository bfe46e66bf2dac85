"""``MoEInt8``, …: ``MoE`` over quantized experts; the router is not quantized, and routing is the same."""

from __future__ import annotations

from moecompiler.config import NormalizationMode
from moecompiler.ops import OpSpec, Value
from moecompiler.plugins.moe.op import moe_body
from moecompiler.plugins.quantized.dequantize import Form
from moecompiler.plugins.quantized.rounding import rounded_by_expert

# rows of all experts → [experts, rows of one, columns]
_BY_EXPERT = """
    {w}_count = Shape(expert_ids)
    {w}_rest = Constant<value_ints = [-1]>()
    {w}_width = Shape<start = 1>({w}_rows)
    {w}_by_expert = Concat<axis = 0>({w}_count, {w}_rest, {w}_width)
    {w} = Reshape({w}_rows, {w}_by_expert)
"""


def quantized_moe_spec(mode: NormalizationMode, top_k: int, form: Form) -> OpSpec:
    """``gate_up_codes [local experts * 2F, H]`` and ``down_codes [local experts * H, F]`` in place of ``MoE``'s weights.
    FP8: experts get ``x`` as its codes by ``gate_up_input_scales`` have it, and what they make of it as its codes by
    ``down_input_scales`` do, both ``[local experts]``; the router gets ``x`` itself."""
    weights = (("gate_up", "gate_up_rows", "hidden"), ("down", "down_rows", "intermediate"))
    rounds = form.rounds_inputs
    scales = tuple(Value(f"{name}_input_scales", ("local_experts",)) for name, *_ in weights) if rounds else ()

    def rounding(weight: str, x: str) -> str:
        return rounded_by_expert(x, f"{weight}_input_scales")

    return OpSpec(
        name=f"MoE{form.name}",
        inputs=(
            Value("x", ("tokens", "hidden")),
            Value("router", ("experts", "hidden")),
            *(value for weight in weights for value in form.values(*weight)),
            *scales,
            Value("expert_ids", ("local_experts",), "int64"),
        ),
        outputs=(Value("y", ("tokens", "hidden")),),
        attributes={"top_k": int, "normalization_mode": int} | form.attributes,
        body="".join(form.body(name, f"{name}_rows", "x") + _BY_EXPERT.format(w=name) for name, *_ in weights)
        + moe_body(mode, top_k, rounding if rounds else None),
        weights=("gate_up", "down"),
    )
