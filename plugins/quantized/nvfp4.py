"""How a body says which numbers NVFP4 codes stand for: by lookup, in types that every backend and GPU has.

Codes ``[rows, in / 2]`` are bytes of two E2M1 codes, the first in the low half; scales ``[rows, in / 16]`` are the bits of E4M3;
global scales ``[rows]`` are float32. Bytes are int8: TensorRT makes 32 bits of each uint8 constant, and floating-point types of 8
and 4 bits exist on some GPUs only. A number is what its E2M1 code stands for, times the product of its block's scale and the
row's global scale: ``DequantizeLinear`` twice, in float32.
"""

from __future__ import annotations

import numpy as np

from moecompiler.quantization.encodings import decode_e2m1, decode_e4m3


def nvfp4_body(weight: str, result: str, like: str | None) -> str:
    """To ``result`` ``[rows, in]``, of the type of ``like``; None: float32."""
    e2m1 = decode_e2m1(np.arange(16, dtype=np.uint8))
    e4m3 = decode_e4m3(np.arange(127, dtype=np.uint8))  # those that a scale may be: neither negative nor NaN
    text = _BODY.format(w=weight, e2m1=_listed(e2m1), e2m1_signed=_listed(np.roll(e2m1, 8)), e4m3=_listed(e4m3))
    if like is None:
        return text + f"    {result} = Reshape({weight}_products, {weight}_shape)\n"
    return (
        text
        + f"""
    {weight}_float = Reshape({weight}_products, {weight}_shape)
    {result} = CastLike({weight}_float, {like})
"""
    )


def _listed(numbers: np.ndarray) -> str:
    return ", ".join(str(float(number)) for number in numbers)


# bytes as numbers of -128 to 127: sixteen times the second code, signed, and the first
_BODY = """
    {w}_one = Constant<value_float = 1.0>()
    {w}_last = Constant<value_ints = [-1]>()
    {w}_bytes = DequantizeLinear({w}_codes, {w}_one)
    {w}_sixteenth = Constant<value_float = 0.0625>()
    {w}_sixteen = Constant<value_float = 16.0>()
    {w}_eight = Constant<value_float = 8.0>()
    {w}_quotients = Mul({w}_bytes, {w}_sixteenth)
    {w}_seconds = Floor({w}_quotients)
    {w}_seconds_part = Mul({w}_seconds, {w}_sixteen)
    {w}_firsts = Sub({w}_bytes, {w}_seconds_part)
    {w}_seconds_from_zero = Add({w}_seconds, {w}_eight)
    {w}_first_indices = Cast<to = 6>({w}_firsts)
    {w}_second_indices = Cast<to = 6>({w}_seconds_from_zero)
    {w}_e2m1 = Constant<value_floats = [{e2m1}]>()
    {w}_e2m1_signed = Constant<value_floats = [{e2m1_signed}]>()
    {w}_first = Gather({w}_e2m1, {w}_first_indices)
    {w}_second = Gather({w}_e2m1_signed, {w}_second_indices)
    {w}_first_column = Unsqueeze({w}_first, {w}_last)
    {w}_second_column = Unsqueeze({w}_second, {w}_last)
    {w}_pairs = Concat<axis = -1>({w}_first_column, {w}_second_column)
    {w}_scales_bits = DequantizeLinear({w}_scales, {w}_one)
    {w}_scales_indices = Cast<to = 6>({w}_scales_bits)
    {w}_e4m3 = Constant<value_floats = [{e4m3}]>()
    {w}_scales_float = Gather({w}_e4m3, {w}_scales_indices)
    {w}_globals = Unsqueeze({w}_global_scales, {w}_last)
    {w}_multipliers = Mul({w}_scales_float, {w}_globals)
    {w}_scales_shape = Shape({w}_scales)
    {w}_blocks_shape = Concat<axis = 0>({w}_scales_shape, {w}_last)
    {w}_blocks = Reshape({w}_pairs, {w}_blocks_shape)
    {w}_multipliers_column = Unsqueeze({w}_multipliers, {w}_last)
    {w}_products = Mul({w}_blocks, {w}_multipliers_column)
    {w}_rows_count = Shape<end = 1>({w}_scales)
    {w}_shape = Concat<axis = 0>({w}_rows_count, {w}_last)
"""
