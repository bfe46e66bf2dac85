"""Experts on many tokens: persistent grouped matrix products over rows sorted by expert, tiles fetched by the copy engine.

Shapes: R rows of the sorted buffer, H hidden, F intermediate, L local experts. An expert's rows begin at a multiple of M;
rows between one expert's last and the next one's first hold garbage, which stays in those rows.
"""

import triton
import triton.language as tl


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _tile(index, row_tiles, column_tiles, L_BLOCK: tl.constexpr):
    """Which tile ``index`` is: local expert, tile of rows in the whole buffer, tile of columns. An expert's row tiles that share
    a tile of weights follow one another. ``row_tiles [L_BLOCK]`` is how many there are for each expert."""
    local = tl.arange(0, L_BLOCK)
    ends = tl.cumsum(row_tiles, 0)
    expert = tl.sum((ends * column_tiles <= index).to(tl.int32), 0)
    before = tl.sum(tl.where(local < expert, row_tiles, 0), 0)
    mine = tl.sum(tl.where(local == expert, row_tiles, 0), 0)
    inside = index - before * column_tiles
    return expert, before + inside % mine, inside // mine


@triton.jit
def many_up(
    sorted_x, gate_up, totals, inner, rows,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, LOCAL: tl.constexpr, L_BLOCK: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, FLATTEN: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``sorted_x [R, H]`` → ``inner [R, F]``, silu(gate) * up."""
    if OVERLAPPED:  # before the descriptors: they lie in scratch memory that the launch before this one may still use
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    a = tl.make_tensor_descriptor(sorted_x, [rows, HIDDEN], [HIDDEN, 1], [M, K])
    b = tl.make_tensor_descriptor(gate_up, [LOCAL * 2 * INTERMEDIATE, HIDDEN], [HIDDEN, 1], [N, K])
    c = tl.make_tensor_descriptor(inner, [rows, INTERMEDIATE], [INTERMEDIATE, 1], [M, N])
    row_tiles = (tl.load(totals + tl.arange(0, L_BLOCK)) + M - 1) // M
    column_tiles: tl.constexpr = (INTERMEDIATE + N - 1) // N
    tiles = tl.sum(row_tiles, 0) * column_tiles
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, row_tile, column_tile = _tile(index, row_tiles, column_tiles, L_BLOCK)
        row = row_tile * M
        column = column_tile * N
        weight_row = expert * (2 * INTERMEDIATE) + column
        gate = tl.zeros([M, N], tl.float32)
        up = tl.zeros([M, N], tl.float32)
        for first in range(0, HIDDEN, K):
            left = a.load([row, first])
            gate = tl.dot(left, b.load([weight_row, first]).T, gate)
            up = tl.dot(left, b.load([weight_row + INTERMEDIATE, first]).T, up)
        c.store([row, column], (_silu(gate) * up).to(inner.dtype.element_ty))


@triton.jit
def many_down(
    inner, down, totals, results, rows,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, LOCAL: tl.constexpr, L_BLOCK: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, FLATTEN: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``inner [R, F]`` → ``results [R, H]``."""
    if OVERLAPPED:  # before the descriptors: they lie in scratch memory that the launch before this one may still use
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    a = tl.make_tensor_descriptor(inner, [rows, INTERMEDIATE], [INTERMEDIATE, 1], [M, K])
    b = tl.make_tensor_descriptor(down, [LOCAL * HIDDEN, INTERMEDIATE], [INTERMEDIATE, 1], [N, K])
    c = tl.make_tensor_descriptor(results, [rows, HIDDEN], [HIDDEN, 1], [M, N])
    row_tiles = (tl.load(totals + tl.arange(0, L_BLOCK)) + M - 1) // M
    column_tiles: tl.constexpr = (HIDDEN + N - 1) // N
    tiles = tl.sum(row_tiles, 0) * column_tiles
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, row_tile, column_tile = _tile(index, row_tiles, column_tiles, L_BLOCK)
        row = row_tile * M
        column = column_tile * N
        result = tl.zeros([M, N], tl.float32)
        for first in range(0, INTERMEDIATE, K):
            result = tl.dot(a.load([row, first]), b.load([expert * HIDDEN + column, first]).T, result)
        c.store([row, column], result.to(results.dtype.element_ty))
