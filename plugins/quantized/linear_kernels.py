"""Products with quantized weights: of one token, and of tiles of tokens, few or many.

Shapes: T tokens, OUT and IN the weight's rows and columns. ``KIND`` says what ``codes`` are: ``int8`` and ``fp8`` bytes
``[OUT, IN]``, ``int4``, ``int4_asymmetric`` and ``nvfp4`` two to a byte ``[OUT, IN / 2]``. Where there are two to a byte they
are never put in order: they are sorted by their place in the byte, or in two, and meet columns of x sorted alike.

``scales`` are one for each ``BLOCK`` columns ``[OUT, IN / BLOCK]``, or one for each row where ``BLOCK`` is 0. ``more`` is what a
kind has besides: zero points ``[OUT, IN / BLOCK]`` int8 of ``int4_asymmetric``, global scales ``[OUT]`` float32 of ``nvfp4``,
whose scales are bits of E4M3, and the scale ``[1]`` by which ``fp8`` rounds x. Other kinds do not read it.
"""

import triton
import triton.language as tl

from moecompiler.plugins.quantized.codes import (
    e2m1_numbers,
    e2m1_quads,
    e4m3_numbers,
    e4m3_rounded,
    four_neighbours,
    int4_quads,
    int4_wide,
    int8_numbers,
    neighbours,
)


@triton.jit
def _pairs(x):
    """Where x's neighbours of 16 bits lie, two by two."""
    return x.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _quads(x):
    """The same, four by four."""
    return x.to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def _of_rows(values, scales, more, row, there, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of rows ``[rows]`` or ``[rows, tokens]``, times what is the same all along a row."""
    rows = there
    scale = tl.full(row.shape, 1.0, tl.float32)
    if KIND == "nvfp4":
        scale = tl.load(more + row, mask=rows, other=0.0)
    elif BLOCK == 0:
        scale = tl.load(scales + row, mask=rows, other=0.0).to(tl.float32)
    if KIND == "fp8":
        scale *= tl.load(more).to(tl.float32)
    if len(values.shape) == 2:
        values *= scale[:, None]
    else:
        values *= scale
    return values


@triton.jit
def one_of_bytes(
    x, codes, scales, more, y,
    OUT: tl.constexpr, IN: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """``x [1, IN]`` → ``y [1, OUT]`` of int8 or fp8; a program computes ``ROWS`` of the OUT."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = codes + row.to(tl.int64)[:, None] * IN
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.static_range(0, IN, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there = (row < OUT)[:, None] & (column < IN)[None, :]
        part = tl.load(rows + column[None, :], mask=there, other=0, eviction_policy="evict_first")
        values = tl.load(x + column, mask=column < IN, other=0.0).to(tl.float32)
        if KIND == "fp8":
            values = e4m3_rounded(values / tl.load(more).to(tl.float32), NATIVE).to(tl.float32)
            numbers = e4m3_numbers(part, tl.float32, NATIVE)
        else:
            numbers = part.to(tl.float32)
        total += numbers * values[None, :]
    result = _of_rows(tl.sum(total, 1), scales, more, row, row < OUT, KIND, 0)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < OUT)


@triton.jit
def one_of_halves(
    x, codes, scales, more, y,
    OUT: tl.constexpr, IN: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The same of two codes to a byte. Columns are taken as groups of ``GROUP``, which are blocks where there are such,
    ``GROUPS`` at a time; ``BYTES`` is the power of two that holds a group's."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.arange(0, BYTES)
    rows = codes + row.to(tl.int64)[:, None, None] * (IN // 2)
    count: tl.constexpr = (IN + GROUP - 1) // GROUP
    total = tl.zeros([ROWS, GROUPS], tl.float32)
    for first in tl.static_range(0, count, GROUPS):
        group = first + tl.arange(0, GROUPS)
        at = group[:, None] * (GROUP // 2) + byte[None, :]
        inside = (byte < GROUP // 2)[None, :] & (at < IN // 2)
        there = (row < OUT)[:, None, None] & inside[None, :, :]
        packed = tl.load(rows + at[None, :, :], mask=there, other=0, eviction_policy="evict_first")
        even, odd = neighbours(tl.load(_pairs(x) + at, mask=inside, other=0), x.dtype.element_ty)
        even, odd = even.to(tl.float32), odd.to(tl.float32)
        if KIND == "nvfp4":
            low, high = e2m1_numbers(packed, x.dtype.element_ty, FAST)
            parts = low.to(tl.float32) * even[None, :, :] + high.to(tl.float32) * odd[None, :, :]
        else:
            low, high = int4_wide(packed)
            parts = low * even[None, :, :] + high * (odd * 0.0625)[None, :, :]
        sums = tl.sum(parts, 2)
        if BLOCK > 0:
            place = row.to(tl.int64)[:, None] * count + group[None, :]
            some = (row < OUT)[:, None] & (group < count)[None, :]
            if KIND == "int4_asymmetric":
                zeros = tl.load(more + place, mask=some, other=0).to(tl.float32)
                sums -= zeros * tl.sum(even + odd, 1)[None, :]
            if KIND == "nvfp4":
                sums *= e4m3_numbers(tl.load(scales + place, mask=some, other=0), tl.float32, NATIVE)
            else:
                sums *= tl.load(scales + place, mask=some, other=0.0).to(tl.float32)
        elif KIND == "int4_asymmetric":
            zeros = tl.load(more + row, mask=row < OUT, other=0).to(tl.float32)
            sums -= zeros[:, None] * tl.sum(even + odd, 1)[None, :]
        total += sums
    result = _of_rows(tl.sum(total, 1), scales, more, row, row < OUT, KIND, BLOCK)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < OUT)


@triton.jit
def tile_of_bytes(
    x, codes, scales, more, y, tokens, share,
    OUT: tl.constexpr, IN: tl.constexpr, KIND: tl.constexpr, ROUNDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``x [T, IN]`` → ``y [T, OUT]`` or, float32, ``[parts, T, OUT]`` of int8 or fp8. With ``ROUNDED`` x is E4M3 already.

    Program (j, i, p): N of the OUT of M tokens, summed over the columns from ``p * share`` on."""
    row = tl.program_id(1) * N + tl.arange(0, N)
    token = tl.program_id(0) * M + tl.arange(0, M)
    k = tl.arange(0, K)
    part = tl.program_id(2)
    rows = codes + row.to(tl.int64)[:, None] * IN + k[None, :]
    columns = x + token.to(tl.int64)[None, :] * IN + k[:, None]
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    result = tl.zeros([N, M], tl.float32)
    for first in range(part * share, min(IN, (part + 1) * share), K):
        inside = first + k < IN
        there = (row < OUT)[:, None] & inside[None, :]
        weights = tl.load(rows + first, mask=there, other=0, eviction_policy="evict_first")
        values = tl.load(columns + first, mask=(token < tokens)[None, :] & inside[:, None], other=0.0)
        if KIND == "fp8":
            if not ROUNDED:
                values = e4m3_rounded(values.to(tl.float32) / tl.load(more).to(tl.float32), NATIVE)
            if NATIVE:
                # the matrix units of SM 9.0 keep 14 bits of a sum: no more than K are added by them
                left = weights.to(tl.float8e4nv, bitcast=True)
                result = tl.dot(left, values, result, max_num_imprecise_acc=K)
            else:
                result = tl.dot(e4m3_numbers(weights, tl.float16, NATIVE), values.to(tl.float16), result)
        else:
            result = tl.dot(int8_numbers(weights, values.dtype, FAST), values, result)
    result = _of_rows(result, scales, more, row, row < OUT, KIND, 0)
    at = y + (part * tokens + token).to(tl.int64)[:, None] * OUT + row[None, :]
    mask = (token < tokens)[:, None] & (row < OUT)[None, :]
    tl.store(at, tl.trans(result).to(y.dtype.element_ty), mask=mask)


@triton.jit
def tile_of_halves(
    x, codes, scales, more, y, tokens, share,
    OUT: tl.constexpr, IN: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    SCALED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """The same of two codes to a byte, K columns at a time, four to 16 bits; ``share`` is in these.

    With ``SPLIT`` x is ``[4, T, IN / 4]``, columns 0, 4, 8, … and so on. ``SCALED``: products of a block are summed, then scaled;
    else weights are scaled, and rounded, before."""
    row = tl.program_id(1) * N + tl.arange(0, N)
    token = tl.program_id(0) * M + tl.arange(0, M)
    k = tl.arange(0, K // 4)
    part = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    rows = codes.to(tl.pointer_type(tl.int16), bitcast=True) + row.to(tl.int64)[:, None] * (IN // 4) + k[None, :]
    columns = token.to(tl.int64)[None, :] * (IN // 4) + k[:, None]
    plane = tokens.to(tl.int64) * (IN // 4)
    blocks: tl.constexpr = IN // BLOCK if BLOCK > 0 else 1
    steps: tl.constexpr = K // BLOCK if BLOCK > 0 and BLOCK < K else 1  # blocks in a tile
    step = tl.arange(0, steps)
    there_row = row < OUT
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    result = tl.zeros([N, M], tl.float32)
    for first in range(part * share, min(IN // 4, (part + 1) * share), K // 4):
        inside = first + k < IN // 4
        quads = tl.load(rows + first, mask=there_row[:, None] & inside[None, :], other=0, eviction_policy="evict_first")
        some = (token < tokens)[None, :] & inside[:, None]
        if SPLIT:
            xa = tl.load(x + columns + first, mask=some, other=0.0)
            xb = tl.load(x + plane + columns + first, mask=some, other=0.0)
            xc = tl.load(x + 2 * plane + columns + first, mask=some, other=0.0)
            xd = tl.load(x + 3 * plane + columns + first, mask=some, other=0.0)
        else:
            xa, xb, xc, xd = four_neighbours(tl.load(_quads(x) + columns + first, mask=some, other=0), dtype)
        if KIND == "nvfp4":
            a, b, c, d = e2m1_quads(quads, dtype, FAST)
        else:
            a, b, c, d = int4_quads(quads, dtype, FAST)
        block = 4 * first // BLOCK + step if BLOCK > 0 else step
        place = row.to(tl.int64)[:, None] * blocks + block[None, :]
        known = there_row[:, None] & (block < blocks)[None, :]
        if KIND == "int4_asymmetric":
            zeros = _along(tl.load(more + place, mask=known, other=0).to(tl.float32).to(dtype), N, K // 4)
            a, b, c, d = a - zeros, b - zeros, c - zeros, d - zeros
        if BLOCK > 0:
            if KIND == "nvfp4":
                scale = e4m3_numbers(tl.load(scales + place, mask=known, other=0), dtype, NATIVE)
            else:
                scale = tl.load(scales + place, mask=known, other=0.0)
            if not SCALED:
                all_scales = _along(scale, N, K // 4)
                a, b, c, d = a * all_scales, b * all_scales, c * all_scales, d * all_scales
        if SCALED:
            sums = tl.dot(d, xd, tl.dot(c, xc, tl.dot(b, xb, tl.dot(a, xa))))
            result += sums * tl.broadcast_to(scale.to(tl.float32), [N, M])
        else:
            result = tl.dot(d, xd, tl.dot(c, xc, tl.dot(b, xb, tl.dot(a, xa, result))))
    result = _of_rows(result, scales, more, row, there_row, KIND, BLOCK)
    at = y + (part * tokens + token).to(tl.int64)[:, None] * OUT + row[None, :]
    mask = (token < tokens)[:, None] & there_row[None, :]
    tl.store(at, tl.trans(result).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _along(values, N: tl.constexpr, COLUMNS: tl.constexpr):
    """``[N, blocks]`` → ``[N, COLUMNS]``, each as often as there are columns to a block."""
    steps: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, None], [N, steps, COLUMNS // steps]), [N, COLUMNS])


@triton.jit
def split(x, split_x, tokens, IN: tl.constexpr, COLUMNS: tl.constexpr, OVERLAPPED: tl.constexpr):
    """``x [T, IN]`` → ``split_x [4, T, IN / 4]``: columns 0, 4, 8, …; 1, 5, 9, …; and so on. Program (t, i): of token t."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    quad = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = quad < IN // 4
    quads = tl.load(_quads(x) + token * (IN // 4) + quad, mask=there, other=0)
    a, b, c, d = four_neighbours(quads, x.dtype.element_ty)
    at = split_x + token * (IN // 4) + quad
    plane = tokens.to(tl.int64) * (IN // 4)
    tl.store(at, a, mask=there)
    tl.store(at + plane, b, mask=there)
    tl.store(at + 2 * plane, c, mask=there)
    tl.store(at + 3 * plane, d, mask=there)


@triton.jit
def round_to_e4m3(
    x, input_scale, rounded, IN: tl.constexpr, COLUMNS: tl.constexpr, NATIVE: tl.constexpr, OVERLAPPED: tl.constexpr
):
    """``x [T, IN]`` → its codes ``[T, IN]``, E4M3; where the GPU does not know these, the numbers they stand for, float16.

    Program (t, i): of token t."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.program_id(0).to(tl.int64) * IN + column
    values = tl.load(x + at, mask=column < IN, other=0.0).to(tl.float32) / tl.load(input_scale).to(tl.float32)
    tl.store(rounded + at, e4m3_rounded(values, NATIVE).to(rounded.dtype.element_ty), mask=column < IN)


@triton.jit
def add_parts(results, y, tokens, parts, OUT: tl.constexpr, COLUMNS: tl.constexpr, OVERLAPPED: tl.constexpr):
    """``results [parts, T, OUT]`` float32 → ``y [T, OUT]``, added in their order. Program (t, i): of token t."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    for part in range(parts):
        total += tl.load(results + (part * tokens + token) * OUT + column, mask=column < OUT, other=0.0)
    tl.store(y + token * OUT + column, total.to(y.dtype.element_ty), mask=column < OUT)
