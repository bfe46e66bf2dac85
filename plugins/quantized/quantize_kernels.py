"""Activations in E4M3 codes, by static scales.

Shapes: T tokens, H hidden, L local experts, K experts per token; ``*_BLOCK`` is a power of two. ``NATIVE``: the GPU rounds to
E4M3 (from compute capability 8.9 on); without it that is arithmetic, which Triton's interpreter needs.
"""

import triton
import triton.language as tl

from moecompiler.plugins.quantized.codes import e4m3_rounded


@triton.jit
def _codes(values, scale, NATIVE: tl.constexpr):
    """``QuantizeLinear`` in float32: the quotient rounded once, ties to even, saturated; NaN stays NaN. As bytes."""
    quotients = tl.div_rn(values.to(tl.float32), scale.to(tl.float32))
    codes = e4m3_rounded(quotients, NATIVE).to(tl.float8e4nv).to(tl.int8, bitcast=True)
    return tl.where(quotients == quotients, codes, 0x7F)


@triton.jit
def quantize_sorted(
    x, places, chosen, scales, sorted_x,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, H_BLOCK: tl.constexpr, NATIVE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``x [T, H]`` → the codes of each routed row, by the scale of its expert, in their places: ``sorted_x [R, H]``.
    ``places [T, K]``: rows of ``sorted_x``, -1 for another rank's; ``chosen [T, K]``: local experts; ``scales [L]``.

    Program (t, i): ``H_BLOCK`` columns of token t."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    column = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    there = column < HIDDEN
    values = tl.load(x + token.to(tl.int64) * HIDDEN + column, mask=there, other=0.0)
    for i in tl.static_range(TOP_K):
        row = tl.load(places + token * TOP_K + i)
        if row >= 0:
            scale = tl.load(scales + tl.load(chosen + token * TOP_K + i))
            tl.store(sorted_x + row.to(tl.int64) * HIDDEN + column, _codes(values, scale, NATIVE), mask=there)


@triton.jit
def quantize_rows(
    x, scale, codes, totals, tokens,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``x [T, COLUMNS]`` → ``codes`` of the same shape by one ``scale [1]``; ``totals [1]``: T.

    Program (t, i): ``BLOCK`` columns of token t."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = token.to(tl.int64) * COLUMNS + column
    values = tl.load(x + at, mask=column < COLUMNS, other=0.0)
    tl.store(codes + at, _codes(values, tl.load(scale), NATIVE), mask=column < COLUMNS)
    if (token == 0) & (tl.program_id(1) == 0):
        tl.store(totals, tokens)
