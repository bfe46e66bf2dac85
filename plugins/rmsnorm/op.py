"""``RMSNorm``, ``AddRMSNorm`` and ``AllReduceAddRMSNorm`` (Zhang & Sennrich 2019, arXiv:1910.07467), as ``MixtralRMSNorm``
computes them: in float32, rounded to the input's type before the weight."""

from __future__ import annotations

from moecompiler.ops import OpSpec, Value

_NORMALIZE = """
    wide = Cast<to = 1>(x)
    two = Constant<value_float = 2.0>()
    square = Pow(wide, two)
    axes = Constant<value_ints = [-1]>()
    mean = ReduceMean<keepdims = 1>(square, axes)
    eps = Constant<value_float: float = @epsilon>()
    shifted = Add(mean, eps)
    root = Sqrt(shifted)
    inverse = Reciprocal(root)
    scaled = Mul(wide, inverse)
    narrow = CastLike(scaled, x)
    y = Mul(weight, narrow)
"""

RMS_NORM = OpSpec(
    name="RMSNorm",
    inputs=(Value("x", ("...", "hidden")), Value("weight", ("hidden",))),
    outputs=(Value("y", ("...", "hidden")),),
    attributes={"epsilon": float},
    body=_NORMALIZE,
)

ADD_RMS_NORM = OpSpec(
    name="AddRMSNorm",
    inputs=(Value("residual", ("...", "hidden")), Value("branch", ("...", "hidden")), Value("weight", ("hidden",))),
    outputs=(Value("y", ("...", "hidden")), Value("x", ("...", "hidden"))),
    attributes={"epsilon": float},
    body="\n    x = Add(residual, branch)" + _NORMALIZE,
)

ALL_REDUCE_ADD_RMS_NORM = OpSpec(
    name="AllReduceAddRMSNorm",
    inputs=ADD_RMS_NORM.inputs,
    outputs=ADD_RMS_NORM.outputs,
    attributes={"epsilon": float, "group": list},
    body="""
    total = moecompiler.AllReduce<group: ints = @group>(branch)
    x = Add(residual, total)"""
    + _NORMALIZE,
)
