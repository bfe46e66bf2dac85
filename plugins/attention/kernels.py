"""Causal grouped-query attention over a KV cache that is written in place, with rotary embedding.

Shapes: B batch, S new tokens, N query heads, KV key-value heads, G = N / KV, D head size, SLOTS of the cache; ``D_BLOCK`` is
the power of two that holds D. Softmax runs in base 2: ``scale`` is the op's times log2(e).

A cache may hold codes (``cache_codes``), whose scales, one for keys and one for values, scores and results are multiplied with.

Decode: the cache's slots are divided among programs (Dao et al. 2023, Flash-Decoding), whose parts are then merged.
Prefill: FlashAttention-2 (Dao 2023, arXiv:2307.08691).
"""

import triton
import triton.language as tl

from moecompiler.plugins.attention.cache_codes import cache_scale, from_codes, to_codes
from moecompiler.plugins.quantized.codes import e4m3_rounded


@triton.jit
def _rotated(x, cos, sin, column, there, D: tl.constexpr):
    """``x * cos + rotate_half(x) * sin`` of the heads at ``x``, whose last axis ``column`` indexes; float32."""
    half: tl.constexpr = D // 2
    turned = tl.where(column < half, column + half, column - half)
    straight = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
    other = tl.load(x + turned, mask=there, other=0.0).to(tl.float32)
    other = tl.where(column < half, -other, other)
    return straight * tl.load(cos + column, mask=there, other=0.0) + other * tl.load(
        sin + column, mask=there, other=0.0
    )


@triton.jit
def decode(
    query, key, value, cos, sin, position_ids, keys, values, output, mixed, sums, slots, scale, parts,
    key_scales, value_scales, CODES: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
    N: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, G_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, T_BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """One new token per sequence. Program (p, h, b) does the p-th part of key-value head h's visible slots in sequence b, and the
    first part also writes and sees the new token. With ``parts`` = 1 it gives ``output [B, 1, N * D]``, else its unfinished
    part: ``mixed [B, N, parts, D]`` and ``sums [B, N, parts, 2]``, the running maximum and sum of the softmax, float32."""
    if OVERLAPPED and parts > 1:  # else what follows is another node's, which may rely on not being let in early
        tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    G: tl.constexpr = N // KV
    column = tl.arange(0, D_BLOCK)
    group = tl.arange(0, G_BLOCK)
    slot = tl.arange(0, T_BLOCK)
    inside = column < D
    # all that does not wait for the position is fetched with it
    position = tl.load(position_ids + batch).to(tl.int32)
    cos_row = cos + batch * D
    sin_row = sin + batch * D
    rows = query + (batch * N + head * G + group)[:, None] * D
    heads = (group < G)[:, None] & inside[None, :]
    new = (batch * KV + head) * D
    dtype = query.dtype.element_ty
    key_scale, value_scale = cache_scale(key_scales, CODES), cache_scale(value_scales, CODES)
    scale = scale * key_scale
    new_value = tl.load(value + new + column, mask=inside, other=0.0)
    value_codes = to_codes(new_value, value_scale, dtype, CODES, NATIVE)
    key_codes = to_codes(_rotated(key + new, cos_row, sin_row, column, inside, D), key_scale, dtype, CODES, NATIVE)
    q = _rotated(rows, cos_row, sin_row, column[None, :], heads, D).to(query.dtype.element_ty)

    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(position - WINDOW + 1, 0)
    before = tl.minimum(position, slots)
    share = (before - oldest + parts * T_BLOCK - 1) // (parts * T_BLOCK) * T_BLOCK
    first = oldest + part * share
    last = tl.minimum(first + share, before)

    cache = (batch * KV + head).to(tl.int64) * slots * D
    highest = tl.full([G_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([G_BLOCK], tl.float32)
    mix = tl.zeros([G_BLOCK, D_BLOCK], tl.float32)
    if part == 0:
        written = inside & (position >= 0) & (position < slots)
        tl.store(keys + cache + position.to(tl.int64) * D + column, key_codes, mask=written)
        tl.store(values + cache + position.to(tl.int64) * D + column, value_codes, mask=written)
        new_key = from_codes(key_codes, dtype, CODES, False, NATIVE)
        new_value = from_codes(value_codes, dtype, CODES, False, NATIVE)
        highest = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
        total += 1.0
        mix += new_value.to(tl.float32)[None, :]
    key_tiles = keys + cache + column[:, None] + slot[None, :] * D
    value_tiles = values + cache + slot[:, None] * D + column[None, :]
    for start in range(first, last, T_BLOCK):
        seen = start + slot < last
        k = tl.load(key_tiles + start * D, mask=inside[:, None] & seen[None, :], other=0)
        v = tl.load(value_tiles + start * D, mask=seen[:, None] & inside[None, :], other=0)
        k, v = from_codes(k, dtype, CODES, FAST, NATIVE), from_codes(v, dtype, CODES, FAST, NATIVE)
        scores = tl.where(seen[None, :], tl.dot(q, k) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        fading = tl.exp2(highest - higher)
        total = total * fading + tl.sum(shares, 1)
        mix = tl.dot(shares.to(v.dtype), v, mix * fading[:, None])
        highest = higher

    mix = mix * value_scale
    index = batch * N + head * G + group
    if parts == 1:
        mix = mix / total[:, None]
        tl.store(output + index[:, None] * D + column[None, :], mix.to(output.dtype.element_ty), mask=heads)
    else:
        at = index * parts + part
        tl.store(mixed + at[:, None] * D + column[None, :], mix, mask=heads)
        tl.store(sums + at * 2, highest, mask=group < G)
        tl.store(sums + at * 2 + 1, total, mask=group < G)


@triton.jit
def merge(
    mixed, sums, output, parts,
    D: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``mixed [rows, parts, D]``, ``sums [rows, parts, 2]`` → ``output [rows, D]``, one program per row, a row being a head of a
    sequence."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    part = tl.arange(0, P_BLOCK)
    column = tl.arange(0, D_BLOCK)
    there = part < parts
    at = row * parts + part
    highest = tl.load(sums + at * 2, mask=there, other=float("-inf"))
    total = tl.load(sums + at * 2 + 1, mask=there, other=0.0)
    mask = there[:, None] & (column < D)[None, :]
    mix = tl.load(mixed + at[:, None] * D + column[None, :], mask=mask, other=0.0)
    fading = tl.exp2(highest - tl.max(highest, 0))
    result = tl.sum(mix * fading[:, None], 0) / tl.sum(total * fading, 0)
    tl.store(output + row * D + column, result.to(output.dtype.element_ty), mask=column < D)


@triton.jit
def append(
    key, value, cos, sin, position_ids, keys, values, length, slots,
    key_scales, value_scales, CODES: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
    KV: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Writes the new tokens' rotated keys and their values into the cache. Program (i, h, b): ``S_BLOCK`` tokens of a head."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(1)
    batch = tl.program_id(2)
    token = tl.program_id(0) * S_BLOCK + tl.arange(0, S_BLOCK)
    column = tl.arange(0, D_BLOCK)[None, :]
    there = (token < length)[:, None] & (column < D)
    row = batch.to(tl.int64) * length + token
    position = tl.load(position_ids + row, mask=token < length, other=-1)
    new = (row * KV + head)[:, None] * D
    angles = row[:, None] * D
    rotated = _rotated(key + new, cos + angles, sin + angles, column, there, D)
    at = ((batch * KV + head).to(tl.int64) * slots + position)[:, None] * D + column
    written = there & ((position >= 0) & (position < slots))[:, None]
    dtype = key.dtype.element_ty
    key_scale, value_scale = cache_scale(key_scales, CODES), cache_scale(value_scales, CODES)
    straight = tl.load(value + new + column, mask=there, other=0.0)
    tl.store(keys + at, to_codes(rotated, key_scale, dtype, CODES, NATIVE), mask=written)
    tl.store(values + at, to_codes(straight, value_scale, dtype, CODES, NATIVE), mask=written)


@triton.jit
def widen(
    keys, values, position_ids, wide_keys, wide_values, length, slots, key_scales, value_scales,
    CODES: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    D_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr, STEP: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """The numbers that a cache of codes stands for, up to the last slot that a sequence sees and to the end of its ``STEP``,
    which is read whole (no share of 0 makes a number of NaN), ``[B * KV, SLOTS, D]``. Program (i, h, b): ``T_BLOCK`` slots of
    a head."""
    first = tl.program_id(0) * T_BLOCK
    head = tl.program_id(1)
    batch = tl.program_id(2)
    token = tl.arange(0, 1024)
    last = tl.full([1024], 0, tl.int64)
    for start in range(0, length, 1024):
        row = batch.to(tl.int64) * length + start + token
        last = tl.maximum(last, tl.load(position_ids + row, mask=start + token < length, other=0))
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if first // STEP <= tl.max(last, 0) // STEP:
        dtype = wide_keys.dtype.element_ty
        key_scale, value_scale = cache_scale(key_scales, CODES), cache_scale(value_scales, CODES)
        slot = first + tl.arange(0, T_BLOCK)
        column = tl.arange(0, D_BLOCK)[None, :]
        there = (slot < slots)[:, None] & (column < D)
        at = ((batch * KV + head).to(tl.int64) * slots + slot)[:, None] * D + column
        k = from_codes(tl.load(keys + at, mask=there, other=0), dtype, CODES, FAST, NATIVE)
        v = from_codes(tl.load(values + at, mask=there, other=0), dtype, CODES, FAST, NATIVE)
        tl.store(wide_keys + at, (k.to(tl.float32) * key_scale).to(dtype), mask=there)
        tl.store(wide_values + at, (v.to(tl.float32) * value_scale).to(dtype), mask=there)


@triton.jit
def _attend(
    q, mix, total, highest, position, first, last, key_tiles, value_tiles, row, scale,
    CODES: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    T_BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Goes on with a tile's softmax over the slots from ``first`` to ``last``; without ``MASKED`` all of them are seen. With
    ``CONTEXT``, ``q`` are numbers of E4M3, maxima are whole, and so are shares, 256 times what they are."""
    slot = tl.arange(0, T_BLOCK)
    # what is multiplied: E4M3's numbers are float16's too
    dtype: tl.constexpr = tl.float16 if CONTEXT else q.dtype
    for start in tl.range(first, last, T_BLOCK):
        k = key_tiles.load([row + start, 0])
        if CONTEXT and NATIVE:
            scores = tl.dot(q, k.to(tl.float8e4nv, bitcast=True).T)
        else:
            scores = tl.dot(q, from_codes(k, dtype, CODES, FAST, NATIVE).T)
        if MASKED:
            seen = (start + slot)[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & ((start + slot)[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.max(scores, 1) * scale
        if CONTEXT:
            higher = tl.ceil(higher)
        higher = tl.maximum(highest, higher)
        # a row that has seen nothing yet has no maximum
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        shares = tl.exp2(scores * scale - base[:, None])
        fading = tl.exp2(highest - base)
        total = total * fading + tl.sum(shares, 1)
        if CONTEXT:
            shares = e4m3_rounded(256.0 * shares, NATIVE)
        v = from_codes(value_tiles.load([row + start, 0]), dtype, CODES, FAST, NATIVE)
        mix = tl.dot(shares.to(dtype), v, mix * fading[:, None])
        highest = higher
    return mix, total, highest


@triton.jit
def prefill(
    query, cos, sin, position_ids, keys, values, output, length, slots, scale, cache_rows,
    key_scales, value_scales, CODES: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr, CONTEXT: tl.constexpr,
    N: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    S_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``query [B, S, N * D]`` over a cache that holds the new tokens → ``output [B, S, N * D]``. Program (h, i, b): ``S_BLOCK``
    tokens of a head, the last tokens first, since they see most. Positions may be any; ``cache_rows`` are B * KV * SLOTS. With
    ``CONTEXT`` both products are of E4M3."""
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = tl.program_id(2)
    token = block * S_BLOCK + tl.arange(0, S_BLOCK)
    column = tl.arange(0, D_BLOCK)
    row = batch.to(tl.int64) * length + token
    there = token < length
    # rows past the end see what the first row sees, and are not written
    position = tl.load(position_ids + tl.where(there, row, batch.to(tl.int64) * length + block * S_BLOCK))
    position = tl.minimum(position, slots - 1).to(tl.int32)
    mask = there[:, None] & (column < D)[None, :]
    at = (row * N + head)[:, None] * D
    angles = row[:, None] * D
    q = _rotated(query + at, cos + angles, sin + angles, column[None, :], mask, D).to(query.dtype.element_ty)
    if CONTEXT:
        q = e4m3_rounded(q.to(tl.float32), NATIVE)
        if not NATIVE:
            q = q.to(tl.float16)
    scale = scale * cache_scale(key_scales, CODES)
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()

    key_tiles = tl.make_tensor_descriptor(keys, [cache_rows, D], [D, 1], [T_BLOCK, D_BLOCK])
    value_tiles = tl.make_tensor_descriptor(values, [cache_rows, D], [D, 1], [T_BLOCK, D_BLOCK])
    cache = (batch * KV + head // (N // KV)) * slots
    mix = tl.zeros([S_BLOCK, D_BLOCK], tl.float32)
    total = tl.zeros([S_BLOCK], tl.float32)
    highest = tl.full([S_BLOCK], float("-inf"), tl.float32)
    lowest_position = tl.min(position, 0)
    end = tl.max(position, 0) + 1
    # whole blocks that every row sees lie from `open` to `full`
    full = tl.maximum(lowest_position + 1, 0) // T_BLOCK * T_BLOCK
    open = 0
    if WINDOW > 0:
        first = tl.maximum(lowest_position - WINDOW + 1, 0) // T_BLOCK * T_BLOCK
        open = tl.minimum((tl.maximum(end - WINDOW, 0) + T_BLOCK - 1) // T_BLOCK * T_BLOCK, full)
        open = tl.maximum(open, first)
        full = tl.maximum(full, open)
        mix, total, highest = _attend(
            q,
            mix,
            total,
            highest,
            position,
            first,
            open,
            key_tiles,
            value_tiles,
            cache,
            scale,
            CODES,
            FAST,
            NATIVE,
            CONTEXT,
            WINDOW,
            T_BLOCK,
            True,
        )
    mix, total, highest = _attend(
        q,
        mix,
        total,
        highest,
        position,
        open,
        full,
        key_tiles,
        value_tiles,
        cache,
        scale,
        CODES,
        FAST,
        NATIVE,
        CONTEXT,
        WINDOW,
        T_BLOCK,
        False,
    )
    mix, total, highest = _attend(
        q,
        mix,
        total,
        highest,
        position,
        full,
        end,
        key_tiles,
        value_tiles,
        cache,
        scale,
        CODES,
        FAST,
        NATIVE,
        CONTEXT,
        WINDOW,
        T_BLOCK,
        True,
    )
    if CONTEXT:
        total = total * 256.0
    mix = mix * cache_scale(value_scales, CODES) / total[:, None]
    tl.store(output + at + column[None, :], mix.to(output.dtype.element_ty), mask=mask)
