"""What a KV cache holds, inside Triton kernels: ``CODES`` 0 says numbers as they are, 1 int8 and 2 the bits of E4M3, in int8.

A code stands for its number times a scale of the layer's, by which kernels multiply scores and results instead.
"""

import triton
import triton.language as tl

from moecompiler.plugins.quantized.codes import e4m3_numbers, e4m3_rounded, int8_numbers


@triton.jit
def cache_scale(scales, CODES: tl.constexpr):
    """``scales [1]`` as a float32; 1 where there are none."""
    return 1.0 if CODES == 0 else tl.load(scales).to(tl.float32)


@triton.jit
def to_codes(x, scale, dtype: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr):
    """Numbers of the op's type ``dtype`` → what the cache holds: the nearest code, ties to even, saturating."""
    if CODES == 0:
        codes = x.to(dtype)
    elif CODES == 1:
        steps = x.to(dtype).to(tl.float32) / scale
        steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)
        # 1.5 * 2^23: a float32 beside it has no room for a fraction
        codes = ((steps + 12582912.0) - 12582912.0).to(tl.int8)
    elif NATIVE:
        codes = e4m3_rounded(x.to(dtype).to(tl.float32) / scale, True).to(tl.int8, bitcast=True)
    else:
        # a float16's fraction cut to three bits; 2^-8 of the number, so exponents are E4M3's
        number = e4m3_rounded(x.to(dtype).to(tl.float32) / scale, False) * 0.00390625
        bits = number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        codes = (((bits >> 8) & 0x80) | ((bits >> 7) & 0x7F)).to(tl.int8)
    return codes


@triton.jit
def from_codes(codes, dtype: tl.constexpr, CODES: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr):
    """What the cache holds → ``dtype``, without the scale."""
    if CODES == 0:
        numbers = codes
    elif CODES == 1:
        numbers = int8_numbers(codes, dtype, FAST)
    else:
        numbers = e4m3_numbers(codes, dtype, NATIVE)
    return numbers
