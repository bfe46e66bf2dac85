"""Quantized experts on one token: matrix-vector products, each code read once, without the matrix units.

Numbers are multiplied and added up in float32. Of two codes in a byte four are taken from 16 bits and meet four neighbours of x:
nothing has to be arranged before. Int4 numbers stay what they are unpacked to, 17/16 + code/128; the sum of a block's x times
what is too much is taken away once.

Shapes: H hidden, F intermediate, L local experts, K experts per token.
"""

import triton
import triton.language as tl

from moecompiler.plugins.quantized.codes import e4m3_numbers, four_neighbours, int8_numbers
from moecompiler.plugins.quantized.few_kernels import inner_values
from moecompiler.plugins.quantized.vector_codes import e2m1_small_quads, int4_raised_quads


@triton.jit
def _some_bytes(codes, row, there, first, IN: tl.constexpr, COLUMNS: tl.constexpr):
    column = first + tl.arange(0, COLUMNS)
    mask = there[:, None] & (column < IN)[None, :]
    return tl.load(codes + row[:, None] * IN + column[None, :], mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _add_bytes(
    total, found, x, first,
    IN: tl.constexpr, COLUMNS: tl.constexpr, CODES: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    column = first + tl.arange(0, COLUMNS)
    values = tl.load(x + column, mask=column < IN, other=0.0).to(tl.float32)
    numbers = int8_numbers(found, tl.float16, FAST) if CODES == "int8" else e4m3_numbers(found, tl.float16, NATIVE)
    return total + numbers.to(tl.float32) * values[None, :]


@triton.jit
def _products_of_bytes(
    x, codes, scales, row, there,
    IN: tl.constexpr, COLUMNS: tl.constexpr, CODES: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([row.shape[0], COLUMNS], tl.float32)
    for first in range(0, IN, 2 * COLUMNS):
        second = first + COLUMNS  # on its way while the first ones are multiplied
        found = _some_bytes(codes, row, there, first, IN, COLUMNS)
        more = _some_bytes(codes, row, there, second, IN, COLUMNS)
        total = _add_bytes(total, found, x, first, IN, COLUMNS, CODES, FAST, NATIVE)
        total = _add_bytes(total, more, x, second, IN, COLUMNS, CODES, FAST, NATIVE)
    return tl.sum(total, 1) * tl.load(scales + row, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _some_quads(codes, row, there, group, IN: tl.constexpr, GROUP: tl.constexpr, QUADS: tl.constexpr):
    """Those of groups of columns ``[rows, groups, QUADS]``, where these are in a row, and whether they are there."""
    quad = tl.arange(0, QUADS)
    at = group[:, None] * (GROUP // 4) + quad[None, :]
    inside = (quad < GROUP // 4)[None, :] & (at < IN // 4)
    rows = codes.to(tl.pointer_type(tl.int16), bitcast=True) + row[:, None, None] * (IN // 4)
    mask = there[:, None, None] & inside[None, :, :]
    return tl.load(rows + at[None, :, :], mask=mask, other=0, eviction_policy="evict_first"), at, inside


@triton.jit
def _add_quads(
    total, quads, x, scales, extra, row, there, group, at, inside,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr, ASYMMETRIC: tl.constexpr, FAST: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    four_x = x.to(tl.pointer_type(tl.int64), bitcast=True)
    xa, xb, xc, xd = four_neighbours(tl.load(four_x + at, mask=inside, other=0), x.dtype.element_ty)
    xa, xb, xc, xd = xa.to(tl.float32), xb.to(tl.float32), xc.to(tl.float32), xd.to(tl.float32)
    if CODES == "e2m1":
        a, b, c, d = e2m1_small_quads(quads, FAST)
    else:
        a, b, c, d = int4_raised_quads(quads, FAST)
    sums = tl.sum(a * xa[None, :, :] + b * xb[None, :, :] + c * xc[None, :, :] + d * xd[None, :, :], 2)
    place = row[:, None] * COUNT + group[None, :] if BLOCK else row[:, None]
    known = there[:, None] & (group < COUNT)[None, :] if BLOCK else there[:, None]
    if CODES == "e2m1":
        sums *= 16384.0
    else:
        too_much = 136.0
        if ASYMMETRIC:
            too_much += tl.load(extra + place, mask=known, other=0).to(tl.float32)
        sums = 128.0 * sums - too_much * tl.sum(xa + xb + xc + xd, 1)[None, :]
    if BLOCK:
        factors = tl.load(scales + place, mask=known, other=0)
        if CODES == "e2m1":
            sums *= e4m3_numbers(factors, tl.float32, NATIVE)
        else:
            sums *= factors.to(tl.float32)
    return total + sums


@triton.jit
def _products_of_halves(
    x, codes, scales, extra, row, there,
    IN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, QUADS: tl.constexpr,
    CODES: tl.constexpr, ASYMMETRIC: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    count: tl.constexpr = (IN + GROUP - 1) // GROUP
    total = tl.zeros([row.shape[0], GROUPS], tl.float32)
    for first in range(0, count, 2 * GROUPS):
        group = first + tl.arange(0, GROUPS)
        second = group + GROUPS  # on its way while the first ones are multiplied
        quads, at, inside = _some_quads(codes, row, there, group, IN, GROUP, QUADS)
        more, at_more, inside_more = _some_quads(codes, row, there, second, IN, GROUP, QUADS)
        total = _add_quads(
            total, quads, x, scales, extra, row, there, group, at, inside, count, BLOCK, CODES, ASYMMETRIC, FAST, NATIVE
        )
        total = _add_quads(
            total, more, x, scales, extra, row, there, second, at_more, inside_more,
            count, BLOCK, CODES, ASYMMETRIC, FAST, NATIVE,
        )  # fmt: skip
    result = tl.sum(total, 1)
    if CODES == "e2m1":
        result *= tl.load(extra + row, mask=there, other=0.0)
    elif BLOCK == 0:
        result *= tl.load(scales + row, mask=there, other=0.0).to(tl.float32)
    return result


@triton.jit
def vector_products(
    x, codes, scales, extra, row, there,
    IN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, QUADS: tl.constexpr,
    COLUMNS: tl.constexpr, CODES: tl.constexpr, ASYMMETRIC: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """``x [IN]`` times rows ``row`` (int64, ``[rows]``, those that are ``there``) of codes ``[…, IN]``: ``[rows]``, float32,
    scaled.

    ``COLUMNS`` at a time; where a byte has two codes, ``GROUPS`` groups of ``GROUP`` columns, which are blocks if there are such,
    and ``QUADS`` is the power of two that holds a group's fours."""
    if CODES == "int8" or CODES == "e4m3":
        result = _products_of_bytes(x, codes, scales, row, there, IN, COLUMNS, CODES, FAST, NATIVE)
    else:
        result = _products_of_halves(
            x, codes, scales, extra, row, there, IN, BLOCK, GROUP, GROUPS, QUADS, CODES, ASYMMETRIC, FAST, NATIVE
        )
    return result


@triton.jit
def one_up(
    x, codes, scales, extra, input_scales, inner_scales, chosen, inner,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, QUADS: tl.constexpr, COLUMNS: tl.constexpr, CODES: tl.constexpr, ASYMMETRIC: tl.constexpr,
    FAST: tl.constexpr, NATIVE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``x [1, H]``, of E4M3 ``[L, 1, H]`` as ``arrange`` rounds it → ``inner [K, F]``; program (k, i) computes ``ROWS`` of the F
    for the token's k-th expert. ``codes``: of ``gate_up [L * 2F, H]``, with ``scales`` and ``extra``."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    which = tl.program_id(0)
    expert = tl.load(chosen + which)
    if expert < 0:
        return
    index = tl.arange(0, 2 * ROWS)  # a row of gate, its row of up, the next of gate, …
    output = tl.program_id(1) * ROWS + index // 2
    row = expert.to(tl.int64) * (2 * INTERMEDIATE) + index % 2 * INTERMEDIATE + output
    values = x
    if CODES == "e4m3":
        values += expert.to(tl.int64) * HIDDEN
    sums = vector_products(
        values, codes, scales, extra, row, output < INTERMEDIATE,
        HIDDEN, BLOCK, GROUP, GROUPS, QUADS, COLUMNS, CODES, ASYMMETRIC, FAST, NATIVE,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(sums, [ROWS, 2]))
    result = inner_values(gate, up, expert, input_scales, inner_scales, CODES)
    at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tl.store(inner + which * INTERMEDIATE + at, result.to(inner.dtype.element_ty), mask=at < INTERMEDIATE)


@triton.jit
def one_down(
    inner, codes, scales, extra, inner_scales, chosen, weights, y,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, QUADS: tl.constexpr, COLUMNS: tl.constexpr, CODES: tl.constexpr,
    ASYMMETRIC: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``inner [K, F]`` → ``y [1, H]``, weighted and summed; a program computes ``ROWS`` of the H. ``codes``: of
    ``down [L * H, F]``, with ``scales`` and ``extra``."""
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([ROWS], tl.float32)
    for which in tl.static_range(TOP_K):
        expert = tl.load(chosen + which)
        weight = tl.load(weights + which)
        if CODES == "e4m3":
            weight *= tl.load(inner_scales + tl.maximum(expert, 0)).to(tl.float32)
        sums = vector_products(
            inner + which * INTERMEDIATE, codes, scales, extra, expert.to(tl.int64) * HIDDEN + output,
            (output < HIDDEN) & (expert >= 0),
            INTERMEDIATE, BLOCK, GROUP, GROUPS, QUADS, COLUMNS, CODES, ASYMMETRIC, FAST, NATIVE,
        )  # fmt: skip
        total += tl.where(expert >= 0, weight * sums, 0.0)  # nothing has been computed for another rank's
    tl.store(y + output, total.to(y.dtype.element_ty), mask=output < HIDDEN)
