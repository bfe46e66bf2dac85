"""``LinearInt8``, …: a product with a quantized weight, as ``torch.nn.Linear`` without a bias."""

from __future__ import annotations

from moecompiler.ops import OpSpec, Value
from moecompiler.plugins.quantized.dequantize import Form


def linear_spec(form: Form) -> OpSpec:
    """``x [..., in] @ weight[out, in].T``."""
    return OpSpec(
        name=f"Linear{form.name}",
        inputs=(Value("x", ("...", "in")), *form.values("weight", "out", "in")),
        outputs=(Value("y", ("...", "out")),),
        attributes=form.attributes,
        body=form.body("weight", "weight_rows")
        + """
    weight_columns = Transpose<perm = [1, 0]>(weight_rows)
    y = MatMul(x, weight_columns)
""",
        weights=("weight",),
    )
