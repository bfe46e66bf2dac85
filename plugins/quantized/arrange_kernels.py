"""Tokens in the order of columns that ``grouped_codes.cu`` takes, which keeps codes as they are and moves what meets them.

Shapes: T tokens, H hidden, K experts per token. ``TWO_IN_A_BYTE``: codes are of 4 bits, and in each 32 columns the one at
``4 u + i`` goes to ``8 i + u``; else in each 16 columns the pair ``2 c + p`` goes to ``4 p + c``.
"""

import triton
import triton.language as tl


@triton.jit
def arranged(values, TWO_IN_A_BYTE: tl.constexpr):
    """``[columns]``, a multiple of 32 of them."""
    if TWO_IN_A_BYTE:
        moved = tl.permute(tl.reshape(values, [values.shape[0] // 32, 8, 4]), [0, 2, 1])
    else:
        moved = tl.permute(tl.reshape(values, [values.shape[0] // 16, 4, 2, 2]), [0, 2, 1, 3])
    return tl.reshape(moved, [values.shape[0]])


@triton.jit
def arrange_sorted(
    x, places, sorted_x,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, H_BLOCK: tl.constexpr, TWO_IN_A_BYTE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``x [T, H]`` → each routed row, arranged, in its place: ``sorted_x [R, H]``. ``places [T, K]``: rows of ``sorted_x``, -1
    for another rank's.

    Program (t, i): ``H_BLOCK`` columns of token t."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    column = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    there = column < HIDDEN
    values = arranged(tl.load(x + token.to(tl.int64) * HIDDEN + column, mask=there, other=0.0), TWO_IN_A_BYTE)
    for i in tl.static_range(TOP_K):
        row = tl.load(places + token * TOP_K + i)
        if row >= 0:
            tl.store(sorted_x + row.to(tl.int64) * HIDDEN + column, values, mask=there)


@triton.jit
def arrange_rows(
    x, arranged_x, totals, tokens,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TWO_IN_A_BYTE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``x [T, COLUMNS]`` → the same, arranged; ``totals [1]``: T.

    Program (t, i): ``BLOCK`` columns of token t."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = token.to(tl.int64) * COLUMNS + column
    values = tl.load(x + at, mask=column < COLUMNS, other=0.0)
    tl.store(arranged_x + at, arranged(values, TWO_IN_A_BYTE), mask=column < COLUMNS)
    if (token == 0) & (tl.program_id(1) == 0):
        tl.store(totals, tokens)
