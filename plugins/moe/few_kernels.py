"""Experts on few tokens, where reading the weights is all the work: each hit expert's are read once, whatever the tokens.

One token is a matrix-vector product. More, up to M, are the narrow operand of a matrix product over all M tokens: those
that are not the expert's are computed with the rest, which costs nothing here, and not stored. So nothing is sorted.

Shapes: T tokens, H hidden, F intermediate, L local experts, K experts per token.
"""

import triton
import triton.language as tl


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def one_up(
    x, gate_up, chosen, inner,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``x [1, H]`` → ``inner [K, F]``; program (k, i) computes ``ROWS`` of the F for the token's k-th expert."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    which = tl.program_id(0)
    expert = tl.load(chosen + which)
    if expert < 0:
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    gate_rows = gate_up + expert.to(tl.int64) * (2 * INTERMEDIATE * HIDDEN) + row[:, None] * HIDDEN
    gate = tl.zeros([ROWS, BLOCK], tl.float32)
    up = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.static_range(0, HIDDEN, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = (row < INTERMEDIATE)[:, None] & (column < HIDDEN)[None, :]
        at = gate_rows + column[None, :]
        gate_part = tl.load(at, mask=there, other=0.0, eviction_policy="evict_first")
        up_part = tl.load(at + INTERMEDIATE * HIDDEN, mask=there, other=0.0, eviction_policy="evict_first")
        values = tl.load(x + column, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
        gate += gate_part.to(tl.float32) * values
        up += up_part.to(tl.float32) * values
    value = silu(tl.sum(gate, 1)) * tl.sum(up, 1)
    tl.store(inner + which * INTERMEDIATE + row, value.to(inner.dtype.element_ty), mask=row < INTERMEDIATE)


@triton.jit
def one_down(
    inner, down, chosen, weights, y,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``inner [K, F]`` → ``y [1, H]``, weighted and summed; a program computes ``ROWS`` of the H."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([ROWS], tl.float32)
    for which in tl.static_range(TOP_K):
        expert = tl.load(chosen + which)
        weight = tl.load(weights + which)
        rows = down + expert.to(tl.int64) * (HIDDEN * INTERMEDIATE) + row[:, None] * INTERMEDIATE
        result = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in tl.static_range(0, INTERMEDIATE, BLOCK):
            column = first + tl.arange(0, BLOCK)
            there = (expert >= 0) & (column < INTERMEDIATE)
            mask = (row < HIDDEN)[:, None] & there[None, :]
            part = tl.load(rows + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            values = tl.load(inner + which * INTERMEDIATE + column, mask=there, other=0.0)
            result += part.to(tl.float32) * values.to(tl.float32)[None, :]
        total += weight * tl.sum(result, 1)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=row < HIDDEN)


@triton.jit
def hit_expert(
    chosen, which, tokens,
    LOCAL: tl.constexpr, L_BLOCK: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The ``which``-th of the local experts that any token has chosen (-1 if there are not so many), and its tokens: bool [M]."""
    token = tl.arange(0, M)[:, None]
    k = tl.arange(0, K_BLOCK)[None, :]
    picks = tl.load(chosen + token * TOP_K + k, mask=(token < tokens) & (k < TOP_K), other=-1)
    local = tl.arange(0, L_BLOCK)
    hit = tl.max(tl.max((picks[:, :, None] == local[None, None, :]).to(tl.int32), 1), 0)
    rank = tl.cumsum(hit, 0) - 1
    expert = tl.max(tl.where((hit > 0) & (rank == which), local, -1), 0)
    return expert, tl.max((picks == expert).to(tl.int32), 1) > 0


@triton.jit
def few_up(
    x, gate_up, chosen, inner, tokens,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, LOCAL: tl.constexpr, L_BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``x [T, H]``, T ≤ M → ``inner [L, T, F]``, an expert's tokens only; program (i, j): N of the F of the j-th expert hit."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert, mine = hit_expert(chosen, tl.program_id(1), tokens, LOCAL, L_BLOCK, TOP_K, K_BLOCK, M)
    if expert < 0:
        return
    row = tl.program_id(0) * N + tl.arange(0, N)
    token = tl.arange(0, M)
    k = tl.arange(0, K)
    rows = gate_up + expert.to(tl.int64) * (2 * INTERMEDIATE * HIDDEN) + row[:, None] * HIDDEN + k[None, :]
    columns = x + token[None, :] * HIDDEN + k[:, None]
    gate = tl.zeros([N, M], tl.float32)
    up = tl.zeros([N, M], tl.float32)
    for first in range(0, HIDDEN, K):
        inside = first + k < HIDDEN
        there = (row < INTERMEDIATE)[:, None] & inside[None, :]
        values = tl.load(columns + first, mask=(token < tokens)[None, :] & inside[:, None], other=0.0)
        gate_part = tl.load(rows + first, mask=there, other=0.0, eviction_policy="evict_first")
        up_part = tl.load(rows + INTERMEDIATE * HIDDEN + first, mask=there, other=0.0, eviction_policy="evict_first")
        gate = tl.dot(gate_part, values, gate)
        up = tl.dot(up_part, values, up)
    result = tl.trans((silu(gate) * up).to(inner.dtype.element_ty))
    at = inner + (expert * tokens + token).to(tl.int64)[:, None] * INTERMEDIATE + row[None, :]
    tl.store(at, result, mask=mine[:, None] & (row < INTERMEDIATE)[None, :])


@triton.jit
def few_down(
    inner, down, chosen, results, tokens,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, LOCAL: tl.constexpr, L_BLOCK: tl.constexpr, TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``inner [L, T, F]`` → ``results [PARTS, L, T, H]`` float32, an expert's tokens only; part p is the sum over its part of F.

    Program (i, j, p): N of the H of the j-th expert hit."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert, mine = hit_expert(chosen, tl.program_id(1), tokens, LOCAL, L_BLOCK, TOP_K, K_BLOCK, M)
    if expert < 0:
        return
    row = tl.program_id(0) * N + tl.arange(0, N)
    token = tl.arange(0, M)
    k = tl.arange(0, K)
    part = tl.program_id(2)
    share: tl.constexpr = (INTERMEDIATE + PARTS * K - 1) // (PARTS * K) * K
    rows = down + expert.to(tl.int64) * (HIDDEN * INTERMEDIATE) + row[:, None] * INTERMEDIATE + k[None, :]
    columns = inner + (expert * tokens + token).to(tl.int64)[None, :] * INTERMEDIATE + k[:, None]
    result = tl.zeros([N, M], tl.float32)
    for first in range(part * share, min(INTERMEDIATE, (part + 1) * share), K):
        inside = first + k < INTERMEDIATE
        values = tl.load(columns + first, mask=mine[None, :] & inside[:, None], other=0.0)
        there = (row < HIDDEN)[:, None] & inside[None, :]
        weights = tl.load(rows + first, mask=there, other=0.0, eviction_policy="evict_first")
        result = tl.dot(weights, values, result)
    at = results + ((part * LOCAL + expert) * tokens + token).to(tl.int64)[:, None] * HIDDEN + row[None, :]
    tl.store(at, tl.trans(result), mask=mine[:, None] & (row < HIDDEN)[None, :])


@triton.jit
def few_combine(
    results, chosen, weights, y, tokens, parts, part_rows,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, H_BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``y [T, H]``: the weighted sum of each token's results, in the order of its experts and parts; ``part_rows`` are L * T.

    Program (t, i): ``H_BLOCK`` columns of token t."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    column = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    there = column < HIDDEN
    total = tl.zeros([H_BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        expert = tl.load(chosen + token * TOP_K + i)
        weight = tl.load(weights + token * TOP_K + i)
        for part in range(parts):
            row = part * part_rows + expert * tokens + token
            at = results + row.to(tl.int64) * HIDDEN + column
            total += weight * tl.load(at, mask=there & (expert >= 0), other=0.0)
    tl.store(y + token * HIDDEN + column, total.to(y.dtype.element_ty), mask=there)
