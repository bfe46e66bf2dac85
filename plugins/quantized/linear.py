"""``LinearInt8``, …: a product with a quantized weight, as ``torch.nn.Linear`` without a bias."""

from __future__ import annotations

from moecompiler.ops import OpSpec, Value
from moecompiler.plugins.quantized.dequantize import Form
from moecompiler.plugins.quantized.rounding import rounded


def linear_spec(form: Form) -> OpSpec:
    """``x [..., in] @ weight[out, in].T``; FP8: with ``x`` as its codes by ``input_scales`` ``[1]`` have it."""
    scale = (Value("input_scales", ("1",)),) if form.rounds_inputs else ()
    return OpSpec(
        name=f"Linear{form.name}",
        inputs=(Value("x", ("...", "in")), *form.values("weight", "out", "in"), *scale),
        outputs=(Value("y", ("...", "out")),),
        attributes=form.attributes,
        body=form.body("weight", "weight_rows", "x")
        + (rounded("x", "input_scales") if form.rounds_inputs else "")
        + f"""
    weight_columns = Transpose<perm = [1, 0]>(weight_rows)
    y = MatMul({"rounded_x" if form.rounds_inputs else "x"}, weight_columns)
""",
        weights=("weight",),
    )
