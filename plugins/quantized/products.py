"""Products of some rows of codes with some tokens, inside Triton kernels: what kernels for few and for many tokens share.

Codes are the left operand of a matrix product, converted in registers on their way from memory, each read once; float32 adds
up. Of two codes in a byte the low ones meet the tokens' even columns and the high ones the odd columns, so nothing is woven
together: tokens come with their even columns first and then their odd ones (``arrange``). A scale of a row multiplies the sum.
Scales of blocks of 32 columns and more multiply the sum over a block; those of smaller blocks the codes, as the body has it.

``CODES``: ``int8``, ``int4``, ``e4m3`` or ``e2m1``; ``BLOCK``: columns with a scale in common, 0: all of a row. ``extra``: the
zero points of int4 where ``ASYMMETRIC``, the global scales of e2m1.
"""

import triton
import triton.language as tl

from moecompiler.plugins.quantized.codes import e2m1_numbers, e4m3_numbers, int4_numbers, int8_numbers


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _tile_scales(
    scales, row, there, column,
    T: tl.constexpr, IN: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What multiplies each byte of a tile: ``[N, K / 2]``."""
    blocks: tl.constexpr = IN // BLOCK
    block = (column + 16 * tl.arange(0, K // 16)) // BLOCK
    found = tl.load(
        scales + row[:, None] * blocks + block[None, :], mask=there[:, None] & (block < blocks)[None, :], other=0
    )
    numbers = e4m3_numbers(found, T, NATIVE) if CODES == "e2m1" else found.to(T)
    return tl.reshape(tl.broadcast_to(numbers[:, :, None], [row.shape[0], K // 16, 8]), [row.shape[0], K // 2])


@triton.jit
def _add_products(
    total, sums, codes, scales, extra, row, there, column, even, odd,
    IN: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr, ASYMMETRIC: tl.constexpr,
    IN_TILE: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """``total [N, M]`` and the products of columns ``column`` on of rows ``row`` with the tokens' values there."""
    T: tl.constexpr = even.dtype
    if CODES == "int8" or CODES == "e4m3":
        at = column + tl.arange(0, K)
        mask = there[:, None] & (at < IN)[None, :]
        found = tl.load(codes + row[:, None] * IN + at[None, :], mask=mask, other=0, eviction_policy="evict_first")
        numbers = int8_numbers(found, T, FAST) if CODES == "int8" else e4m3_numbers(found, T, NATIVE)
        total = tl.dot(numbers, even, total)
    else:
        at = column // 2 + tl.arange(0, K // 2)
        mask = there[:, None] & (at < IN // 2)[None, :]
        found = tl.load(
            codes + row[:, None] * (IN // 2) + at[None, :], mask=mask, other=0, eviction_policy="evict_first"
        )
        low, high = e2m1_numbers(found, T, FAST) if CODES == "e2m1" else int4_numbers(found, T, FAST)
        if IN_TILE:
            factors = _tile_scales(scales, row, there, column, T, IN, K, BLOCK, CODES, NATIVE)
            if ASYMMETRIC:
                zeros = _tile_scales(extra, row, there, column, T, IN, K, BLOCK, CODES, NATIVE)
                low, high = low - zeros, high - zeros
            total = tl.dot(low * factors, even, total)
            total = tl.dot(high * factors, odd, total)
        elif BLOCK == 0:
            total = tl.dot(low, even, total)
            total = tl.dot(high, odd, total)
        else:
            blocks: tl.constexpr = IN // BLOCK
            at_block = row * blocks + column // BLOCK
            known = there & (column < IN)
            factor = tl.load(scales + at_block, mask=known, other=0.0).to(tl.float32)
            part = tl.dot(high, odd, tl.dot(low, even))
            if ASYMMETRIC:
                zero = tl.load(extra + at_block, mask=known, other=0).to(tl.float32)
                part -= zero[:, None] * sums
            total += factor[:, None] * part
    return total


@triton.jit
def _scaled(
    total, sums, scales, extra, row, there,
    BLOCK: tl.constexpr, CODES: tl.constexpr, ASYMMETRIC: tl.constexpr,
):  # fmt: skip
    """With what belongs to a whole row."""
    if CODES == "e2m1":
        total *= tl.load(extra + row, mask=there, other=0.0)[:, None]
    elif BLOCK == 0:
        if ASYMMETRIC:
            total -= tl.load(extra + row, mask=there, other=0).to(tl.float32)[:, None] * sums
        total *= tl.load(scales + row, mask=there, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def row_products(
    values, mine, codes, scales, extra, row, begin, end,
    IN: tl.constexpr, OUT: tl.constexpr, PAIR: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    CODES: tl.constexpr, ASYMMETRIC: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` ``[N]`` of a matrix ``[OUT, IN]`` of codes times tokens, summed over columns from ``begin`` to ``end``:
    ``[N, M]``, float32, scaled; with ``PAIR`` those of the matrix behind it too, else something.

    ``values``: where the tokens begin, ``[1, M]``, those that are ``mine`` ``[M]``. ``K`` columns at a time, which have scales in
    common, ``STEPS`` times in a turn of the loop.
    """
    first_total = tl.zeros([row.shape[0], mine.shape[0]], tl.float32)
    second_total = tl.zeros([row.shape[0], mine.shape[0]], tl.float32)
    sums = tl.zeros([row.shape[0], mine.shape[0]], tl.float32)
    there = row < OUT
    HALVES: tl.constexpr = CODES == "int4" or CODES == "e2m1"
    IN_TILE: tl.constexpr = CODES == "e2m1" or (BLOCK > 0 and BLOCK % 32 > 0)
    ROW_BYTES: tl.constexpr = IN // 2 if HALVES else IN
    ROW_SCALES: tl.constexpr = IN // BLOCK if BLOCK else 1
    ROW_EXTRA: tl.constexpr = 1 if CODES == "e2m1" else ROW_SCALES
    for turn in range(begin, end, STEPS * K):
        for step in tl.static_range(STEPS):
            column = turn + step * K
            if HALVES:
                at = column // 2 + tl.arange(0, K // 2)
                mask = (at < IN // 2)[:, None] & mine[None, :]
                even = tl.load(values + at[:, None], mask=mask, other=0.0)
                odd = tl.load(values + IN // 2 + at[:, None], mask=mask, other=0.0)
            else:
                at = column + tl.arange(0, K)
                even = tl.load(values + at[:, None], mask=(at < IN)[:, None] & mine[None, :], other=0.0)
                odd = even
            if ASYMMETRIC and not IN_TILE:  # the zero points multiply the sums of the tokens' values
                ones = tl.full([row.shape[0], K // 2], 1.0, even.dtype)
                before = tl.zeros_like(sums) if BLOCK else sums
                sums = tl.dot(ones, odd, tl.dot(ones, even, before))
            first_total = _add_products(
                first_total, sums, codes, scales, extra, row, there, column, even, odd,
                IN, K, BLOCK, CODES, ASYMMETRIC, IN_TILE, FAST, NATIVE,
            )  # fmt: skip
            if PAIR:
                second_total = _add_products(
                    second_total, sums, codes + OUT * ROW_BYTES, scales + OUT * ROW_SCALES, extra + OUT * ROW_EXTRA,
                    row, there, column, even, odd, IN, K, BLOCK, CODES, ASYMMETRIC, IN_TILE, FAST, NATIVE,
                )  # fmt: skip
    first_total = _scaled(first_total, sums, scales, extra, row, there, BLOCK, CODES, ASYMMETRIC)
    if PAIR:
        second_total = _scaled(
            second_total, sums, scales + OUT * ROW_SCALES, extra + OUT * ROW_EXTRA, row, there, BLOCK, CODES, ASYMMETRIC
        )
    return first_total, second_total
