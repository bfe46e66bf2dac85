"""Codes to numbers, and numbers rounded to E4M3, inside Triton kernels.

Codes come as int8 bytes: int8 itself, two int4 or E2M1 to a byte, the first in the low half, or the bits of E4M3. ``dtype`` is
that of the numbers: ``tl.float16``, ``tl.bfloat16`` or, without ``fast``, ``tl.float32``. Every number is exact.

With ``fast`` four bytes are unpacked at a time, in PTX: ``prmt`` puts a code into the lowest bits of a number whose exponent
makes these bits ones, and a subtraction takes away what is too much (Kim et al., "Who Says Elephants Can't Run", 2022). Without
it all is plain arithmetic, which every GPU and Triton's interpreter have: ``fast`` needs compute capability 8.0, E4M3 8.9.
"""

import triton
import triton.language as tl

# 0x64 before a byte u is 1024 + u in float16; u is the code + 128
INT8_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 u, c;
    xor.b32 u, $2, 0x80808080;
    mov.b32 c, 0x64806480;
    prmt.b32 $0, u, 0x64646464, 0x4140;
    prmt.b32 $1, u, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, c;
    sub.f16x2 $1, $1, c;
}""")

# u is the code + 8
INT4_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 u, v, c;
    lop3.b32 u, $4, 0x0f0f0f0f, 0x08080808, 0x6a;
    shr.u32 v, $4, 4;
    lop3.b32 v, v, 0x0f0f0f0f, 0x08080808, 0x6a;
    mov.b32 c, 0x64086408;
    prmt.b32 $0, u, 0x64646464, 0x4140;
    prmt.b32 $1, u, 0x64646464, 0x4342;
    prmt.b32 $2, v, 0x64646464, 0x4140;
    prmt.b32 $3, v, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, c;
    sub.f16x2 $1, $1, c;
    sub.f16x2 $2, $2, c;
    sub.f16x2 $3, $3, c;
}""")

# 0x43 before a byte u is 128 + u in bfloat16
INT4_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 u, v, c, one;
    lop3.b32 u, $4, 0x0f0f0f0f, 0x08080808, 0x6a;
    shr.u32 v, $4, 4;
    lop3.b32 v, v, 0x0f0f0f0f, 0x08080808, 0x6a;
    mov.b32 c, 0xc308c308;
    mov.b32 one, 0x3f803f80;
    prmt.b32 $0, u, 0x43434343, 0x4140;
    prmt.b32 $1, u, 0x43434343, 0x4342;
    prmt.b32 $2, v, 0x43434343, 0x4140;
    prmt.b32 $3, v, 0x43434343, 0x4342;
    fma.rn.bf16x2 $0, $0, one, c;
    fma.rn.bf16x2 $1, $1, one, c;
    fma.rn.bf16x2 $2, $2, one, c;
    fma.rn.bf16x2 $3, $3, one, c;
}""")

# sign, exponent and fraction where float16 has them: 2^-14 of the number, subnormals too
E2M1_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 u, v, s, t, c;
    mov.b32 c, 0x74007400;
    prmt.b32 u, $4, 0, 0x4140;
    prmt.b32 v, $4, 0, 0x4342;
    shl.b32 s, u, 12;
    and.b32 s, s, 0x80008000;
    shl.b32 t, u, 9;
    lop3.b32 $0, t, 0x0e000e00, s, 0xea;
    shl.b32 s, v, 12;
    and.b32 s, s, 0x80008000;
    shl.b32 t, v, 9;
    lop3.b32 $1, t, 0x0e000e00, s, 0xea;
    shl.b32 s, u, 8;
    and.b32 s, s, 0x80008000;
    shl.b32 t, u, 5;
    lop3.b32 $2, t, 0x0e000e00, s, 0xea;
    shl.b32 s, v, 8;
    and.b32 s, s, 0x80008000;
    shl.b32 t, v, 5;
    lop3.b32 $3, t, 0x0e000e00, s, 0xea;
    mul.f16x2 $0, $0, c;
    mul.f16x2 $1, $1, c;
    mul.f16x2 $2, $2, c;
    mul.f16x2 $3, $3, c;
}""")

# where bfloat16 has them: 2^-126 of the number
E2M1_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 u, v, s, t, c, zero;
    mov.b32 c, 0x7e807e80;
    mov.b32 zero, 0x80008000;
    prmt.b32 u, $4, 0, 0x4140;
    prmt.b32 v, $4, 0, 0x4342;
    shl.b32 s, u, 12;
    and.b32 s, s, 0x80008000;
    shl.b32 t, u, 6;
    lop3.b32 $0, t, 0x01c001c0, s, 0xea;
    shl.b32 s, v, 12;
    and.b32 s, s, 0x80008000;
    shl.b32 t, v, 6;
    lop3.b32 $1, t, 0x01c001c0, s, 0xea;
    shl.b32 s, u, 8;
    and.b32 s, s, 0x80008000;
    shl.b32 t, u, 2;
    lop3.b32 $2, t, 0x01c001c0, s, 0xea;
    shl.b32 s, v, 8;
    and.b32 s, s, 0x80008000;
    shl.b32 t, v, 2;
    lop3.b32 $3, t, 0x01c001c0, s, 0xea;
    fma.rn.bf16x2 $0, $0, c, zero;
    fma.rn.bf16x2 $1, $1, c, zero;
    fma.rn.bf16x2 $2, $2, c, zero;
    fma.rn.bf16x2 $3, $3, c, zero;
}""")

# four codes to 16 bits, of which a word has two; those at bit 4 of a byte are 1024 + 16 u
INT4_QUADS_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 u, c, sixteenth, d;
    mov.b32 c, 0x64086408;
    mov.b32 sixteenth, 0x2c002c00;
    mov.b32 d, 0xd480d480;
    shr.u32 u, $4, 8;
    lop3.b32 $0, $4, 0x000f000f, 0x64086408, 0x6a;
    lop3.b32 $1, $4, 0x00f000f0, 0x64806480, 0x6a;
    lop3.b32 $2, u, 0x000f000f, 0x64086408, 0x6a;
    lop3.b32 $3, u, 0x00f000f0, 0x64806480, 0x6a;
    sub.f16x2 $0, $0, c;
    fma.rn.f16x2 $1, $1, sixteenth, d;
    sub.f16x2 $2, $2, c;
    fma.rn.f16x2 $3, $3, sixteenth, d;
}""")

INT4_QUADS_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 u, v, w, c, one;
    mov.b32 c, 0xc308c308;
    mov.b32 one, 0x3f803f80;
    shr.u32 u, $4, 4;
    shr.u32 v, $4, 8;
    shr.u32 w, $4, 12;
    lop3.b32 $0, $4, 0x000f000f, 0x43084308, 0x6a;
    lop3.b32 $1, u, 0x000f000f, 0x43084308, 0x6a;
    lop3.b32 $2, v, 0x000f000f, 0x43084308, 0x6a;
    lop3.b32 $3, w, 0x000f000f, 0x43084308, 0x6a;
    fma.rn.bf16x2 $0, $0, one, c;
    fma.rn.bf16x2 $1, $1, one, c;
    fma.rn.bf16x2 $2, $2, one, c;
    fma.rn.bf16x2 $3, $3, one, c;
}""")

E2M1_QUADS_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 s, t, c;
    mov.b32 c, 0x74007400;
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
    mul.f16x2 $0, $0, c;
    mul.f16x2 $1, $1, c;
    mul.f16x2 $2, $2, c;
    mul.f16x2 $3, $3, c;
}""")

E2M1_QUADS_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 s, t, c, zero;
    mov.b32 c, 0x7e807e80;
    mov.b32 zero, 0x80008000;
    shl.b32 s, $4, 12;
    and.b32 s, s, 0x80008000;
    shl.b32 t, $4, 6;
    lop3.b32 $0, t, 0x01c001c0, s, 0xea;
    shl.b32 s, $4, 8;
    and.b32 s, s, 0x80008000;
    shl.b32 t, $4, 2;
    lop3.b32 $1, t, 0x01c001c0, s, 0xea;
    shl.b32 s, $4, 4;
    and.b32 s, s, 0x80008000;
    shr.u32 t, $4, 2;
    lop3.b32 $2, t, 0x01c001c0, s, 0xea;
    and.b32 s, $4, 0x80008000;
    shr.u32 t, $4, 6;
    lop3.b32 $3, t, 0x01c001c0, s, 0xea;
    fma.rn.bf16x2 $0, $0, c, zero;
    fma.rn.bf16x2 $1, $1, c, zero;
    fma.rn.bf16x2 $2, $2, c, zero;
    fma.rn.bf16x2 $3, $3, c, zero;
}""")

_TWO = tl.constexpr("=&r,=&r,r")
_FOUR = tl.constexpr("=&r,=&r,=&r,=&r,r")


@triton.jit
def int8_numbers(codes, dtype: tl.constexpr, fast: tl.constexpr):
    """int8 → its numbers."""
    if fast and dtype == tl.float16:
        numbers = tl.inline_asm_elementwise(INT8_TO_FLOAT16, _TWO, [codes], tl.float16, is_pure=True, pack=4)
    elif fast:
        numbers = codes.to(dtype)
    else:
        numbers = codes.to(tl.float32).to(dtype)
    return numbers


@triton.jit
def nibbles(packed):
    """Two int4 to a byte → int8, the low and the high ones."""
    return (packed << 4) >> 4, packed >> 4


@triton.jit
def int4_numbers(packed, dtype: tl.constexpr, fast: tl.constexpr):
    """Two int4 to a byte → numbers, the low and the high ones."""
    if fast and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            INT4_TO_FLOAT16, _FOUR, [packed], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif fast and dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            INT4_TO_BFLOAT16, _FOUR, [packed], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low_codes, high_codes = nibbles(packed)
        low, high = low_codes.to(tl.float32).to(dtype), high_codes.to(tl.float32).to(dtype)
    return low, high


@triton.jit
def int4_wide(packed):
    """Two int4 to a byte → float32, the low ones and 16 times the high ones."""
    # 2^23 + u; u is the code + 8
    wide = packed.to(tl.int32)
    low = ((wide & 0x0F) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0
    high = ((wide & 0xF0) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
    return low, high


@triton.jit
def neighbours(pairs, dtype: tl.constexpr):
    """Two neighbours of 16 bits, loaded as int32 → ``dtype``, the first and the second ones."""
    first = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return first, second


@triton.jit
def _neighbour(quads, place: tl.constexpr, dtype: tl.constexpr):
    return (quads >> (16 * place)).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def four_neighbours(quads, dtype: tl.constexpr):
    """Four neighbours of 16 bits, loaded as int64 → ``dtype``: the first ones, the second ones, and so on."""
    first, second = _neighbour(quads, 0, dtype), _neighbour(quads, 1, dtype)
    return first, second, _neighbour(quads, 2, dtype), _neighbour(quads, 3, dtype)


@triton.jit
def _e2m1_number(code, dtype: tl.constexpr):
    bits = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.int16)
    return (bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0).to(dtype)


@triton.jit
def e2m1_numbers(packed, dtype: tl.constexpr, fast: tl.constexpr):
    """Two E2M1 (OCP Microscaling 1.0) to a byte → numbers, the low and the high ones."""
    if fast and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            E2M1_TO_FLOAT16, _FOUR, [packed], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif fast and dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            E2M1_TO_BFLOAT16, _FOUR, [packed], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        wide = packed.to(tl.int32)
        low, high = _e2m1_number(wide, dtype), _e2m1_number(wide >> 4, dtype)
    return low, high


@triton.jit
def _int4_of_quad(quads, place: tl.constexpr, dtype: tl.constexpr):
    return ((quads << (12 - 4 * place)) >> 12).to(tl.float32).to(dtype)


@triton.jit
def int4_quads(quads, dtype: tl.constexpr, fast: tl.constexpr):
    """Four int4 to an int16 → numbers: the first ones, the second ones, and so on."""
    if fast and dtype == tl.float16:
        halves: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
        a, b, c, d = tl.inline_asm_elementwise(INT4_QUADS_TO_FLOAT16, _FOUR, [quads], halves, is_pure=True, pack=2)
    elif fast and dtype == tl.bfloat16:
        bfloats: tl.constexpr = (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16)
        a, b, c, d = tl.inline_asm_elementwise(INT4_QUADS_TO_BFLOAT16, _FOUR, [quads], bfloats, is_pure=True, pack=2)
    else:
        a, b = _int4_of_quad(quads, 0, dtype), _int4_of_quad(quads, 1, dtype)
        c, d = _int4_of_quad(quads, 2, dtype), _int4_of_quad(quads, 3, dtype)
    return a, b, c, d


@triton.jit
def e2m1_quads(quads, dtype: tl.constexpr, fast: tl.constexpr):
    """Four E2M1 to an int16 → numbers, as ``int4_quads``."""
    if fast and dtype == tl.float16:
        halves: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
        a, b, c, d = tl.inline_asm_elementwise(E2M1_QUADS_TO_FLOAT16, _FOUR, [quads], halves, is_pure=True, pack=2)
    elif fast and dtype == tl.bfloat16:
        bfloats: tl.constexpr = (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16)
        a, b, c, d = tl.inline_asm_elementwise(E2M1_QUADS_TO_BFLOAT16, _FOUR, [quads], bfloats, is_pure=True, pack=2)
    else:
        wide = quads.to(tl.int32)
        a, b = _e2m1_number(wide, dtype), _e2m1_number(wide >> 4, dtype)
        c, d = _e2m1_number(wide >> 8, dtype), _e2m1_number(wide >> 12, dtype)
    return a, b, c, d


@triton.jit
def e4m3_numbers(codes, dtype: tl.constexpr, native: tl.constexpr):
    """The bits of E4M3 (OCP FP8), NaN excepted → numbers, also float32; with ``native`` the GPU knows the type."""
    if native:
        numbers = codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        # sign, exponent and fraction where float16 has them: 2^-8 of the number, subnormals too
        wide = codes.to(tl.int32)
        bits = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.int16)
        numbers = (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)
    return numbers


@triton.jit
def e4m3_rounded(x, native: tl.constexpr):
    """float32 → the nearest number of E4M3, ties to even, saturated at ±448: ``float8e4nv`` if ``native``, else float32."""
    kept = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if native:
        rounded = kept.to(tl.float8e4nv)
    else:
        # added to 2^20 times the power of two below it, a number ends where three bits of fraction do
        size = tl.abs(kept)
        exponent = tl.maximum(size.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
        large = (exponent + (20 << 23)).to(tl.float32, bitcast=True)
        size = (size + large) - large
        rounded = tl.where(kept < 0, -size, size)
    return rounded
