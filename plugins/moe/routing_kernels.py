"""Routing: router logits, the experts of each token and their weights, and each routed row's place among its expert's rows.

Shapes: T tokens, H hidden, E experts, L local experts, K experts per token; ``*_BLOCK`` is the power of two that holds them.
"""

import triton
import triton.language as tl


@triton.jit
def _logits_of_one(
    x, router, token, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, E_BLOCK: tl.constexpr, H_BLOCK: tl.constexpr
):
    expert = tl.arange(0, E_BLOCK)
    total = tl.zeros([E_BLOCK], tl.float32)
    for first in range(0, HIDDEN, H_BLOCK):
        column = first + tl.arange(0, H_BLOCK)
        there = column < HIDDEN
        row = tl.load(x + token.to(tl.int64) * HIDDEN + column, mask=there, other=0.0).to(tl.float32)
        experts = tl.load(
            router + expert[:, None] * HIDDEN + column[None, :],
            mask=(expert < EXPERTS)[:, None] & there[None, :],
            other=0.0,
        )
        total += tl.sum(experts.to(tl.float32) * row[None, :], 1)
    return total[None, :]


@triton.jit
def _logits(
    x, router, first_token, tokens,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, E_BLOCK: tl.constexpr, H_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, E_BLOCK)
    token = first_token + tl.arange(0, T_BLOCK)
    total = tl.zeros([T_BLOCK, E_BLOCK], tl.float32)
    for first in range(0, HIDDEN, H_BLOCK):
        column = first + tl.arange(0, H_BLOCK)
        there = column < HIDDEN
        rows = tl.load(
            x + token.to(tl.int64)[:, None] * HIDDEN + column[None, :],
            mask=(token < tokens)[:, None] & there[None, :],
            other=0.0,
        )
        experts = tl.load(
            router + expert[None, :] * HIDDEN + column[:, None],
            mask=(expert < EXPERTS)[None, :] & there[:, None],
            other=0.0,
        )
        total = tl.dot(rows, experts, total)
    return total


@triton.jit
def _choose(logits, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, MODE: tl.constexpr, THRESHOLD: tl.constexpr):
    """Logits ``[T, E]`` (−∞ where there is no expert) → experts and weights, ``[T, K_BLOCK]``. Of equals the first is taken."""
    expert = tl.arange(0, logits.shape[1])[None, :]
    place = tl.arange(0, K_BLOCK)[None, :]
    chosen = tl.full([logits.shape[0], K_BLOCK], -1, tl.int32)
    weights = tl.zeros([logits.shape[0], K_BLOCK], tl.float32)
    highest = tl.max(logits, 1)[:, None]
    remaining = logits
    if MODE == 0:  # NONE: the softmax over all experts
        exponentials = tl.exp(logits - highest)
        remaining = exponentials / tl.sum(exponentials, 1)[:, None]
    for i in tl.static_range(TOP_K):
        largest = tl.max(remaining, 1)[:, None]
        index = tl.argmax(remaining, 1)[:, None]
        weight = largest
        if MODE == 1:  # RENORMALIZE: the softmax over the chosen ones
            weight = tl.exp(largest - highest)
        if MODE == 2:  # SPARSE_MIXER: the softmax over what is close to the chosen one
            far = (largest - logits) / tl.maximum(tl.abs(logits), largest) > THRESHOLD
            near = tl.exp(tl.where(far, float("-inf"), remaining) - largest)
            weight = tl.sum(tl.where(expert == index, near, 0.0), 1)[:, None] / tl.sum(near, 1)[:, None]
        chosen = tl.where(place == i, index, chosen)
        weights = tl.where(place == i, weight, weights)
        remaining = tl.where(expert == index, float("-inf"), remaining)
    if MODE == 1:
        weights = weights / tl.sum(weights, 1)[:, None]
    return chosen, weights


@triton.jit
def route(
    x, router, expert_ids, chosen, weights, counts, tokens,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, LOCAL: tl.constexpr, TOP_K: tl.constexpr, MODE: tl.constexpr,
    THRESHOLD: tl.constexpr, E_BLOCK: tl.constexpr, L_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, H_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``x [T, H]``, ``router [E, H]``, ``expert_ids [L]`` → ``chosen [T, K]``, the local index of each chosen expert or -1 where
    it is another rank's; ``weights [T, K]`` float32; and with ``T_BLOCK`` > 1 ``counts [programs, L_BLOCK]``, the rows per
    local expert in each program's ``T_BLOCK`` tokens."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
    first_token = tl.program_id(0) * T_BLOCK
    if T_BLOCK == 1:
        total = _logits_of_one(x, router, first_token, HIDDEN, EXPERTS, E_BLOCK, H_BLOCK)
    else:
        total = _logits(x, router, first_token, tokens, HIDDEN, EXPERTS, E_BLOCK, H_BLOCK, T_BLOCK)
    rounded = total.to(x.dtype.element_ty).to(tl.float32)  # as the router's product is in the model
    expert = tl.arange(0, E_BLOCK)[None, :]
    experts, shares = _choose(tl.where(expert < EXPERTS, rounded, float("-inf")), TOP_K, K_BLOCK, MODE, THRESHOLD)

    local = tl.arange(0, L_BLOCK)
    ids = tl.load(expert_ids + local, mask=local < LOCAL, other=-2).to(tl.int32)
    # one local expert at most, also of ids that are all the same, as where tactics are timed
    index = tl.max(tl.where(experts[:, :, None] == ids[None, None, :], local[None, None, :], -1), 2)

    token = first_token + tl.arange(0, T_BLOCK)[:, None]
    place = tl.arange(0, K_BLOCK)[None, :]
    there = (token < tokens) & (place < TOP_K)
    tl.store(chosen + token * TOP_K + place, index, mask=there)
    tl.store(weights + token * TOP_K + place, shares, mask=there)
    if T_BLOCK > 1:
        here = (index[:, :, None] == local[None, None, :]) & there[:, :, None]
        rows = tl.sum(tl.sum(here.to(tl.int32), 1), 0)
        tl.store(counts + tl.program_id(0) * L_BLOCK + local, rows)


@triton.jit
def place(
    x, chosen, counts, rows, totals, sorted_x, tokens, blocks,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, L_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr, A_BLOCK: tl.constexpr,
    H_BLOCK: tl.constexpr, M: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Sorts rows by expert: ``rows [T, K]`` is each routed row's place in ``sorted_x`` (-1: another rank's), ``totals [L_BLOCK]``
    the rows per expert. An expert's rows begin at a multiple of ``M``, in the order of tokens: the result is always the same.

    Program (i, j) moves columns ``j * H_BLOCK`` on of the tokens that program i of ``route`` has counted; ``blocks`` are route's
    programs, ``A_BLOCK`` the power of two that holds ``T_BLOCK * K``.
    """
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    local = tl.arange(0, L_BLOCK)
    total = tl.zeros([L_BLOCK], tl.int32)
    before = tl.zeros([L_BLOCK], tl.int32)
    for first in range(0, blocks, 64):
        index = first + tl.arange(0, 64)
        some = tl.load(counts + index[:, None] * L_BLOCK + local[None, :], mask=(index < blocks)[:, None], other=0)
        total += tl.sum(some, 0)
        before += tl.sum(tl.where((index < block)[:, None], some, 0), 0)
    padded = (total + M - 1) // M * M
    start = tl.cumsum(padded, 0) - padded + before

    assignment = tl.arange(0, A_BLOCK)
    token = block * T_BLOCK + assignment // TOP_K
    there = (assignment < T_BLOCK * TOP_K) & (token < tokens)
    expert = tl.load(chosen + block * T_BLOCK * TOP_K + assignment, mask=there, other=-1)
    mine = (expert[:, None] == local[None, :]).to(tl.int32)
    row = tl.sum(mine * (start[None, :] + tl.cumsum(mine, 0)), 1) - 1
    if tl.program_id(1) == 0:
        tl.store(rows + block * T_BLOCK * TOP_K + assignment, row, mask=there)
        if block == 0:
            tl.store(totals + local, total)
    column = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    moved = (row >= 0)[:, None] & (column < HIDDEN)[None, :]
    values = tl.load(x + token.to(tl.int64)[:, None] * HIDDEN + column[None, :], mask=moved)
    tl.store(sorted_x + row.to(tl.int64)[:, None] * HIDDEN + column[None, :], values, mask=moved)
