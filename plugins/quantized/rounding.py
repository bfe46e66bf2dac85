"""How the bodies of FP8 ops quantize what meets a weight: to E4M3 (ties to even, saturating) by a static scale, and back.

``code = E4M3(x / scale)`` with a quotient in float32, ``code * scale`` rounded once to the type of ``x``: ONNX's
``QuantizeLinear`` and ``DequantizeLinear``, whose pair in front of a product TensorRT knows. It knows no scales of activations by
axis. Where each expert has a scale of its own, the quotient and the product with it stand in the body, in float32, around
codes by a scale of 1, which gives the same numbers.
"""

from __future__ import annotations

from moecompiler.ops import OpSpec, Value

_ROUNDED = """
    {x}_codes = QuantizeLinear<output_dtype = 17>({x}, {scale})
    rounded_{x} = DequantizeLinear({x}_codes, {scale})
"""

_ROUNDED_BY_EXPERT = """
    {x}_scales_axes = Constant<value_ints = [1, 2]>()
    {x}_scales_by_expert = Unsqueeze({scales}, {x}_scales_axes)
    {x}_scales = Cast<to = 1>({x}_scales_by_expert)
    {x}_wide = Cast<to = 1>({x})
    {x}_quotients = Div({x}_wide, {x}_scales)
    {x}_one = Constant<value_float = 1.0>()
    {x}_codes = QuantizeLinear<output_dtype = 17>({x}_quotients, {x}_one)
    {x}_steps = DequantizeLinear({x}_codes, {x}_one)
    {x}_products = Mul({x}_steps, {x}_scales)
    rounded_{x} = CastLike({x}_products, {x})
"""


def rounded(x: str, scale: str) -> str:
    """From ``x`` ``[..., in]`` and ``scale`` ``[1]`` to ``rounded_{x}``."""
    return _ROUNDED.format(x=x, scale=scale)


def rounded_by_expert(x: str, scales: str) -> str:
    """From ``x`` ``[tokens, in]`` or ``[experts, tokens, in]`` and ``scales`` ``[experts]`` to ``rounded_{x}``
    ``[experts, tokens, in]``."""
    return _ROUNDED_BY_EXPERT.format(x=x, scales=scales)


def round_by_expert_spec() -> OpSpec:
    """``RoundFp8ByExpert``: what each expert's weight meets, where products with the experts' weights are plain ones."""
    return OpSpec(
        name="RoundFp8ByExpert",
        inputs=(Value("x", ("...", "tokens", "in")), Value("input_scales", ("experts",))),
        outputs=(Value("y", ("experts", "tokens", "in")),),
        attributes={},
        body=rounded_by_expert("x", "input_scales")
        + """
    y = Identity(rounded_x)
""",
    )
