"""How the bodies of quantized ops say which numbers codes stand for, and ``Dequantize…``, the op that says no more.

Codes are rows: ``[rows, in]``, the rows of a layer's experts one below the other. TensorRT (10.6) dequantizes per row with
scales ``[rows]`` and ``axis`` 0, int4 in blocks with scales ``[rows, in / block]``, and nothing of more axes; and it knows no
zero points. Where there are such, the codes themselves are taken as numbers (a scale of 1), and what is subtracted and
multiplied stands in the body. That is exact: codes less zero points are small integers, and the product is rounded once, as
``DequantizeLinear`` rounds it.

Where a checkpoint groups input features in another order than they have (GPTQ's act-order), codes stand in that order, a
group's side by side, and ``positions`` ``[sets, in]`` says where in a row of codes each feature is. A set of rows has an order
of its own: all rows, or those of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecompiler.ops import OpSpec, Value
from moecompiler.plugins.quantized.nvfp4 import nvfp4_body
from moecompiler.quantization.schemes import Format, Granularity, WeightScheme

_CODES = {
    Format.INT8: "int8",
    Format.INT4: "int4",
    Format.UINT4: "int4",
    Format.E4M3: "float8_e4m3fn",
    Format.E2M1: "int8",
}
_NAMES = {
    Format.INT8: "Int8",
    Format.INT4: "Int4",
    Format.UINT4: "Int4Asymmetric",
    Format.E4M3: "Fp8",
    Format.E2M1: "Nvfp4",
}


@dataclass(frozen=True)
class Form:
    """What of a scheme an op's name tells: all but the size of blocks, which is an attribute, ``block_size``."""

    format: Format
    blocks: bool
    ordered: bool = False

    @property
    def name(self) -> str:
        """The end of an op's name: a graph holds one body for each name."""
        kind = "" if self.blocks or self.format in (Format.INT8, Format.E4M3) else "Rows"
        return _NAMES[self.format] + kind + ("Ordered" if self.ordered else "")

    @property
    def codes_dtype(self) -> str:
        """Of the codes, as ONNX has it. Those with zero points are stored less 8: TensorRT knows no unsigned ones."""
        return _CODES[self.format]

    @property
    def asymmetric(self) -> bool:
        return self.format is Format.UINT4

    @property
    def rounds_inputs(self) -> bool:
        """Whether what meets the weight is held as codes too, with scales that are inputs of the op (``rounding``)."""
        return self.format is Format.E4M3

    @property
    def two_level(self) -> bool:
        """NVFP4 (see ``nvfp4``): two codes to a byte, and global scales; the size of blocks is always the same."""
        return self.format is Format.E2M1

    @property
    def attributes(self) -> dict[str, type]:
        return {"block_size": int} if self.blocks and not self.two_level else {}

    def values(self, weight: str, rows: str, columns: str) -> tuple[Value, ...]:
        """The inputs that stand for ``weight`` ``[rows, columns]``."""
        scales = (rows, f"{columns}_blocks") if self.blocks else (rows,)
        if self.two_level:
            return (
                Value(f"{weight}_codes", (rows, f"{columns}_pairs"), self.codes_dtype),
                Value(f"{weight}_scales", scales, "int8"),
                Value(f"{weight}_global_scales", (rows,), "float32"),
            )
        values: tuple[Value, ...] = (
            Value(f"{weight}_codes", (rows, columns), self.codes_dtype),
            Value(f"{weight}_scales", scales),
        )
        if self.asymmetric:
            values = (*values, Value(f"{weight}_zero_points", scales, "int8"))
        return (*values, Value(f"{weight}_positions", (f"{weight}_sets", columns), "int64")) if self.ordered else values

    def body(self, weight: str, result: str, like: str | None = None) -> str:
        """From these inputs to ``result`` ``[rows, columns]`` of the scales' type; NVFP4's of that of ``like``, or float32."""
        if self.two_level:
            return nvfp4_body(weight, result, like)
        how = "axis = 1, block_size: int = @block_size" if self.blocks else "axis = 0"
        text = _ASYMMETRIC if self.asymmetric else _SYMMETRIC
        if not self.ordered:
            return text.format(w=weight, how=how, result=result)
        inner = f"{weight}_grouped_features"
        return text.format(w=weight, how=how, result=inner) + _ORDERED.format(w=weight, inner=inner, result=result)


_SYMMETRIC = """
    {result} = DequantizeLinear<{how}>({w}_codes, {w}_scales)
"""

_ASYMMETRIC = """
    {w}_one_float = Constant<value_float = 1.0>()
    {w}_one = CastLike({w}_one_float, {w}_scales)
    {w}_scales_shape = Shape({w}_scales)
    {w}_ones = Expand({w}_one, {w}_scales_shape)
    {w}_steps = DequantizeLinear<{how}>({w}_codes, {w}_ones)
    {w}_zeros = DequantizeLinear({w}_zero_points, {w}_one)
    {w}_last = Constant<value_ints = [-1]>()
    {w}_grouped_shape = Concat<axis = 0>({w}_scales_shape, {w}_last)
    {w}_grouped = Reshape({w}_steps, {w}_grouped_shape)
    {w}_zeros_grouped = Unsqueeze({w}_zeros, {w}_last)
    {w}_scales_grouped = Unsqueeze({w}_scales, {w}_last)
    {w}_differences = Sub({w}_grouped, {w}_zeros_grouped)
    {w}_products = Mul({w}_differences, {w}_scales_grouped)
    {w}_shape = Shape({w}_steps)
    {result} = Reshape({w}_products, {w}_shape)
"""

# no Gather along the rows: each set has positions of its own
_ORDERED = """
    {w}_sets = Shape<end = 1>({w}_positions)
    {w}_any = Constant<value_ints = [-1]>()
    {w}_features_count = Shape<start = 1>({w}_positions)
    {w}_by_set_shape = Concat<axis = 0>({w}_sets, {w}_any, {w}_features_count)
    {w}_by_set = Reshape({inner}, {w}_by_set_shape)
    {w}_by_feature = Transpose<perm = [0, 2, 1]>({w}_by_set)
    {w}_indices = Unsqueeze({w}_positions, {w}_any)
    {w}_in_order = GatherND<batch_dims = 1>({w}_by_feature, {w}_indices)
    {w}_rows_in_order = Transpose<perm = [0, 2, 1]>({w}_in_order)
    {w}_inner_shape = Shape({inner})
    {result} = Reshape({w}_rows_in_order, {w}_inner_shape)
"""


def form_of(scheme: WeightScheme) -> Form | None:
    """None for schemes that graphs have no ops for. FP8 scales of matrices become those of their rows."""
    if scheme.format not in _CODES or (scheme.granularity is Granularity.TENSOR and scheme.format is not Format.E4M3):
        return None
    return Form(scheme.format, scheme.granularity is Granularity.BLOCK, scheme.act_order)


def forms() -> tuple[Form, ...]:
    """All that graphs have ops for."""
    return (
        *(Form(f, False) for f in (Format.INT8, Format.E4M3)),
        *(Form(f, blocks) for f in (Format.INT4, Format.UINT4) for blocks in (True, False)),
        *(Form(f, True, ordered=True) for f in (Format.INT4, Format.UINT4)),
        Form(Format.E2M1, True),
    )


def dequantize_spec(form: Form) -> OpSpec:
    """``DequantizeInt8``, …: codes → weight ``[rows, columns]`` of the scales' type; NVFP4's float32."""
    return OpSpec(
        name=f"Dequantize{form.name}",
        inputs=form.values("weight", "rows", "columns"),
        outputs=(Value("y", ("rows", "columns"), "float32" if form.two_level else "T"),),
        attributes=form.attributes,
        body=form.body("weight", "y"),
        weights=("weight",),
    )
