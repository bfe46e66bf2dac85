"""Quantized experts on many tokens, on any GPU: rows sorted by expert, each program a tile of a product.

Shapes: R rows of the sorted buffer, H hidden, F intermediate, L local experts. An expert's rows begin at a multiple of M; rows
between one expert's last and the next one's first hold garbage, which stays in those rows. Tiles of rows of an expert follow one
another, so tiles that share codes run at the same time.
"""

import triton
import triton.language as tl

from moecompiler.plugins.quantized.few_kernels import inner_column, inner_values
from moecompiler.plugins.quantized.products import row_products


@triton.jit
def _tile(totals, index, L_BLOCK: tl.constexpr, M: tl.constexpr):
    """The expert whose ``index``-th tile of M rows it is, ``L_BLOCK`` if there are not so many; and how many rows are left."""
    local = tl.arange(0, L_BLOCK)
    total = tl.load(totals + local)
    tiles = (total + M - 1) // M
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= index).to(tl.int32), 0)
    here = local == expert
    left = tl.sum(tl.where(here, total - (index - ends + tiles) * M, 0), 0)
    return expert, left


@triton.jit
def many_up(
    x, codes, scales, extra, input_scales, inner_scales, totals, inner,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, L_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr, ASYMMETRIC: tl.constexpr,
    FAST: tl.constexpr, NATIVE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """x, sorted and arranged → ``inner [R, F]``, arranged; program (i, j): N of the F of the i-th tile of rows."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert, left = _tile(totals, tl.program_id(0), L_BLOCK, M)
    if expert == L_BLOCK:
        return
    row = tl.program_id(1) * N + tl.arange(0, N)
    token = tl.arange(0, M)
    at_token = (tl.program_id(0) * M + token).to(tl.int64)
    ROW_BYTES: tl.constexpr = HIDDEN // 2 if CODES == "int4" or CODES == "e2m1" else HIDDEN
    ROW_SCALES: tl.constexpr = HIDDEN // BLOCK if BLOCK else 1
    first_row = expert.to(tl.int64) * (2 * INTERMEDIATE)
    gate, up = row_products(
        x + at_token[None, :] * HIDDEN, token < left, codes + first_row * ROW_BYTES, scales + first_row * ROW_SCALES,
        extra + first_row * (1 if CODES == "e2m1" else ROW_SCALES), row, 0, HIDDEN,
        HIDDEN, INTERMEDIATE, True, K, STEPS, BLOCK, CODES, ASYMMETRIC, FAST, NATIVE,
    )  # fmt: skip
    result = inner_values(gate, up, expert, input_scales, inner_scales, CODES).to(inner.dtype.element_ty)
    at = inner + at_token[:, None] * INTERMEDIATE + inner_column(row, INTERMEDIATE, CODES)[None, :]
    tl.store(at, tl.trans(result), mask=(token < left)[:, None] & (row < INTERMEDIATE)[None, :])


@triton.jit
def many_down(
    inner, codes, scales, extra, inner_scales, totals, results,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, L_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr, ASYMMETRIC: tl.constexpr,
    FAST: tl.constexpr, NATIVE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """inner, arranged → ``results [R, H]``; program (i, j): N of the H of the i-th tile of rows."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert, left = _tile(totals, tl.program_id(0), L_BLOCK, M)
    if expert == L_BLOCK:
        return
    row = tl.program_id(1) * N + tl.arange(0, N)
    token = tl.arange(0, M)
    at_token = (tl.program_id(0) * M + token).to(tl.int64)
    ROW_BYTES: tl.constexpr = INTERMEDIATE // 2 if CODES == "int4" or CODES == "e2m1" else INTERMEDIATE
    ROW_SCALES: tl.constexpr = INTERMEDIATE // BLOCK if BLOCK else 1
    first_row = expert.to(tl.int64) * HIDDEN
    result, _ = row_products(
        inner + at_token[None, :] * INTERMEDIATE, token < left, codes + first_row * ROW_BYTES,
        scales + first_row * ROW_SCALES, extra + first_row * (1 if CODES == "e2m1" else ROW_SCALES), row,
        0, INTERMEDIATE,
        INTERMEDIATE, HIDDEN, False, K, STEPS, BLOCK, CODES, ASYMMETRIC, FAST, NATIVE,
    )  # fmt: skip
    if CODES == "e4m3":
        result *= tl.load(inner_scales + expert).to(tl.float32)
    at = results + at_token[:, None] * HIDDEN + row[None, :]
    mask = (token < left)[:, None] & (row < HIDDEN)[None, :]
    tl.store(at, tl.trans(result).to(results.dtype.element_ty), mask=mask)
