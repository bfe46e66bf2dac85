"""Quantized experts on few tokens, each hit expert's codes read once: as ``moe.few_kernels`` does it with floats.

Shapes: T tokens, H hidden, F intermediate, L local experts, K experts per token. What products meet lies as ``arrange`` puts it.
E4M3: it is numbers that E4M3 has, in float16, times a scale: of each expert for x, ``[L, T, H]``, and for what comes between the
products, ``[L, T, F]``.
"""

import triton
import triton.language as tl

from moecompiler.plugins.moe.few_kernels import hit_expert
from moecompiler.plugins.quantized.codes import e4m3_rounded
from moecompiler.plugins.quantized.products import row_products, silu


@triton.jit
def arrange(
    x, input_scales, totals, arranged, tokens,
    HIDDEN: tl.constexpr, HALVES: tl.constexpr, ROUNDED: tl.constexpr, SORTED: tl.constexpr, L_BLOCK: tl.constexpr,
    M: tl.constexpr, H_BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``x [T, H]`` → ``arranged``: with ``HALVES`` ``[T, H]``, even columns before odd ones; ``ROUNDED``: ``[L, T, H]``,
    divided by each expert's scale and rounded to what E4M3 has.

    With ``SORTED``, x are rows sorted by expert, an expert's from a multiple of M on, and ``arranged`` has one row for each.
    Program (t, i, l): ``H_BLOCK`` columns of a row, for expert l."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        if SORTED:
            tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(2)
    if SORTED:
        ends = tl.cumsum((tl.load(totals + tl.arange(0, L_BLOCK)) + M - 1) // M, 0)
        expert = tl.sum((ends <= tl.program_id(0) // M).to(tl.int32), 0)
        if expert == L_BLOCK:
            return
    to = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    there = to < HIDDEN
    column = to
    if HALVES:
        column = to % (HIDDEN // 2) * 2 + to // (HIDDEN // 2)
    values = tl.load(x + row * HIDDEN + column, mask=there, other=0.0)
    if ROUNDED:
        scale = tl.load(input_scales + expert).to(tl.float32)
        values = e4m3_rounded(tl.div_rn(values.to(tl.float32), scale), False)
    if not SORTED:
        row += expert.to(tl.int64) * tokens
    tl.store(arranged + row * HIDDEN + to, values.to(arranged.dtype.element_ty), mask=there)
    if OVERLAPPED and not SORTED:  # who waits for this kernel, waits for routing too
        tl.extra.cuda.gdc_wait()


@triton.jit
def inner_values(gate, up, expert, input_scales, inner_scales, CODES: tl.constexpr):
    """silu(gate) * up; for E4M3 with the scale of x, rounded as the body does it."""
    if CODES == "e4m3":
        scale = tl.load(input_scales + expert).to(tl.float32)
        inner = (silu(gate * scale) * (up * scale)).to(inner_scales.dtype.element_ty).to(tl.float32)
        return e4m3_rounded(tl.div_rn(inner, tl.load(inner_scales + expert).to(tl.float32)), False)
    return silu(gate) * up


@triton.jit
def inner_column(row, INTERMEDIATE: tl.constexpr, CODES: tl.constexpr):
    """Where what row ``row`` of the up product makes is put: it is a column of the down product."""
    column = row
    if CODES == "int4" or CODES == "e2m1":
        column = row % 2 * (INTERMEDIATE // 2) + row // 2
    return column


@triton.jit
def few_up(
    x, codes, scales, extra, input_scales, inner_scales, chosen, inner, tokens,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, LOCAL: tl.constexpr, L_BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    CODES: tl.constexpr, ASYMMETRIC: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """x, arranged, T ≤ M → ``inner [L, T, F]``, arranged, an expert's tokens only; program (i, j): N of the F of the j-th
    expert hit. ``codes``: of ``gate_up [L * 2F, H]``, with ``scales`` and ``extra``."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert, mine = hit_expert(chosen, tl.program_id(1), tokens, LOCAL, L_BLOCK, TOP_K, K_BLOCK, M)
    if expert < 0:
        return
    row = tl.program_id(0) * N + tl.arange(0, N)
    token = tl.arange(0, M)
    first_token = expert * tokens if CODES == "e4m3" else 0
    values = x + (first_token + token).to(tl.int64)[None, :] * HIDDEN
    ROW_BYTES: tl.constexpr = HIDDEN // 2 if CODES == "int4" or CODES == "e2m1" else HIDDEN
    ROW_SCALES: tl.constexpr = HIDDEN // BLOCK if BLOCK else 1
    first_row = expert.to(tl.int64) * (2 * INTERMEDIATE)
    gate, up = row_products(
        values, token < tokens, codes + first_row * ROW_BYTES, scales + first_row * ROW_SCALES,
        extra + first_row * (1 if CODES == "e2m1" else ROW_SCALES), row, 0, HIDDEN,
        HIDDEN, INTERMEDIATE, True, K, STEPS, BLOCK, CODES, ASYMMETRIC, FAST, NATIVE,
    )  # fmt: skip
    result = inner_values(gate, up, expert, input_scales, inner_scales, CODES).to(inner.dtype.element_ty)
    at = inner + (expert * tokens + token).to(tl.int64)[:, None] * INTERMEDIATE
    at += inner_column(row, INTERMEDIATE, CODES)[None, :]
    tl.store(at, tl.trans(result), mask=mine[:, None] & (row < INTERMEDIATE)[None, :])


@triton.jit
def few_down(
    inner, codes, scales, extra, inner_scales, chosen, results, tokens,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, LOCAL: tl.constexpr, L_BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    CODES: tl.constexpr, ASYMMETRIC: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr, PARTS: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """inner → ``results [PARTS, L, T, H]`` float32, an expert's tokens only; part p is the sum over its part of F.

    Program (i, j, p): N of the H of the j-th expert hit. ``codes``: of ``down [L * H, F]``, with ``scales`` and ``extra``."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert, mine = hit_expert(chosen, tl.program_id(1), tokens, LOCAL, L_BLOCK, TOP_K, K_BLOCK, M)
    if expert < 0:
        return
    row = tl.program_id(0) * N + tl.arange(0, N)
    token = tl.arange(0, M)
    part = tl.program_id(2)
    turn: tl.constexpr = STEPS * K
    share: tl.constexpr = (INTERMEDIATE + PARTS * turn - 1) // (PARTS * turn) * turn
    values = inner + (expert * tokens + token).to(tl.int64)[None, :] * INTERMEDIATE
    ROW_BYTES: tl.constexpr = INTERMEDIATE // 2 if CODES == "int4" or CODES == "e2m1" else INTERMEDIATE
    ROW_SCALES: tl.constexpr = INTERMEDIATE // BLOCK if BLOCK else 1
    first_row = expert.to(tl.int64) * HIDDEN
    result, _ = row_products(
        values, mine, codes + first_row * ROW_BYTES, scales + first_row * ROW_SCALES,
        extra + first_row * (1 if CODES == "e2m1" else ROW_SCALES), row,
        part * share, min(INTERMEDIATE, (part + 1) * share),
        INTERMEDIATE, HIDDEN, False, K, STEPS, BLOCK, CODES, ASYMMETRIC, FAST, NATIVE,
    )  # fmt: skip
    if CODES == "e4m3":
        result *= tl.load(inner_scales + expert).to(tl.float32)
    at = results + ((part * LOCAL + expert) * tokens + token).to(tl.int64)[:, None] * HIDDEN + row[None, :]
    tl.store(at, tl.trans(result), mask=mine[:, None] & (row < HIDDEN)[None, :])
