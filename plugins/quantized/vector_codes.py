"""Codes of 4 bits to numbers in float32, but for a sum or a factor that they have in common: what is cheapest to multiply by.

As in ``codes``: with ``fast`` in PTX, without it in plain arithmetic. Every number is exact.
"""

import triton
import triton.language as tl

from moecompiler.plugins.quantized.codes import e2m1_quads, int4_quads

# 0x3f80 before a byte u of 7 bits is 1 + u/128 in float32; u is the code + 8
INT4_QUADS_RAISED = tl.constexpr("""{
    .reg .b32 u, v, c;
    mov.b32 c, 0x3f000000;
    shr.u32 v, $8, 4;
    lop3.b32 u, $8, 0x0f0f0f0f, 0x88888888, 0x6a;
    lop3.b32 v, v, 0x0f0f0f0f, 0x88888888, 0x6a;
    prmt.b32 $0, u, c, 0x7044;
    prmt.b32 $1, u, c, 0x7244;
    prmt.b32 $2, v, c, 0x7044;
    prmt.b32 $3, v, c, 0x7244;
    prmt.b32 $4, u, c, 0x7144;
    prmt.b32 $5, u, c, 0x7344;
    prmt.b32 $6, v, c, 0x7144;
    prmt.b32 $7, v, c, 0x7344;
}""")

# as E2M1_QUADS_TO_FLOAT16 up to what it is multiplied by
E2M1_QUADS_SMALL = tl.constexpr("""{
    .reg .b32 s, t;
    shl.b32 s, $4, 12;
    and.b32 s, s, 0x80008000;
    shl.b32 t, $4, 9;
    lop3.b32 $0, t, 0x0e000e00, s, 0xea;
    shl.b32 s, $4, 8;
    and.b32 s, s, 0x80008000;
    shl.b32 t, $4, 5;
    lop3.b32 $1, t, 0x0e000e00, s, 0xea;
    shl.b32 s, $4, 4;
    and.b32 s, s, 0x80008000;
    shl.b32 t, $4, 1;
    lop3.b32 $2, t, 0x0e000e00, s, 0xea;
    and.b32 s, $4, 0x80008000;
    shr.u32 t, $4, 3;
    lop3.b32 $3, t, 0x0e000e00, s, 0xea;
}""")

_FOUR = tl.constexpr("=&r,=&r,=&r,=&r,r")
_EIGHT = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r")


@triton.jit
def int4_raised_quads(quads, fast: tl.constexpr):
    """Four int4 to an int16 → float32, 17/16 + code/128: the first ones, the second ones, and so on."""
    if fast:
        floats: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        a, b, c, d = tl.inline_asm_elementwise(INT4_QUADS_RAISED, _EIGHT, [quads], floats, is_pure=True, pack=2)
    else:
        a, b, c, d = int4_quads(quads, tl.float32, fast)
        a, b, c, d = a / 128 + 1.0625, b / 128 + 1.0625, c / 128 + 1.0625, d / 128 + 1.0625
    return a, b, c, d


@triton.jit
def e2m1_small_quads(quads, fast: tl.constexpr):
    """Four E2M1 to an int16 → float32, 2^-14 of the numbers, as ``int4_raised_quads``."""
    if fast:
        halves: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
        a, b, c, d = tl.inline_asm_elementwise(E2M1_QUADS_SMALL, _FOUR, [quads], halves, is_pure=True, pack=2)
        a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    else:
        a, b, c, d = e2m1_quads(quads, tl.float32, fast)
        a, b, c, d = a / 16384, b / 16384, c / 16384, d / 16384
    return a, b, c, d
