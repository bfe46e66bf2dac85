"""Experts on many tokens: persistent grouped matrix products over rows sorted by expert, tiles fetched by the copy engine.

Shapes: R rows of the sorted buffer, H hidden, F intermediate, L local experts, K experts per token. An expert's rows begin at a
multiple of M; rows between one expert's last and the next one's first hold garbage, which stays in those rows. With ``TAILS``
an expert's last tile of the up product has M / 2 or M / 4 rows where these are enough.

Tiles are numbered by expert, then by columns, then by rows, so tiles that share weights run at the same time.
"""

import triton
import triton.language as tl


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _row_tiles(totals, L_BLOCK: tl.constexpr, M: tl.constexpr):
    """Per expert, how many tiles of rows there are."""
    return (tl.load(totals + tl.arange(0, L_BLOCK)) + M - 1) // M


@triton.jit
def _at(values, index):
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == index, values, 0), 0)


@triton.jit
def _before(values, index):
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) < index, values, 0), 0)


@triton.jit
def _tile(index, tiles, column_tiles):
    """Tile ``index``: its expert, its tile of rows in the expert, its tile of columns."""
    expert = tl.sum((tl.cumsum(tiles, 0) * column_tiles <= index).to(tl.int32), 0)
    inside = index - _before(tiles, expert) * column_tiles
    mine = tl.maximum(_at(tiles, expert), 1)
    return expert, inside % mine, inside // mine


@triton.jit
def _store_rows(matrix, row, column, values, WIDTH: tl.constexpr):
    """Without the copy engine, which would keep shared memory for it."""
    rows = row.to(tl.int64) + tl.arange(0, values.shape[0])
    columns = column + tl.arange(0, values.shape[1])
    there = (columns < WIDTH)[None, :]
    tl.store(matrix + rows[:, None] * WIDTH + columns[None, :], values.to(matrix.dtype.element_ty), mask=there)


@triton.jit
def _up_tile(
    a, b, row, weight_row,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    gate = tl.zeros([M, N], tl.float32)
    up = tl.zeros([M, N], tl.float32)
    for first in range(0, HIDDEN, K):
        left = a.load([row, first])
        gate = tl.dot(left, b.load([weight_row, first]).T, gate)
        up = tl.dot(left, b.load([weight_row + INTERMEDIATE, first]).T, up)
    return _silu(gate) * up


@triton.jit
def _up_tile_of_few(
    a, b, row, weight_row,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The same where M is under the 64 rows that the matrix units take of a left operand: the weights are the left one."""
    gate = tl.zeros([N, M], tl.float32)
    up = tl.zeros([N, M], tl.float32)
    for first in range(0, HIDDEN, K):
        right = a.load([row, first]).T
        gate = tl.dot(b.load([weight_row, first]), right, gate)
        up = tl.dot(b.load([weight_row + INTERMEDIATE, first]), right, up)
    return tl.trans(_silu(gate) * up)


@triton.jit
def many_up(
    sorted_x, gate_up, totals, inner, rows,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, LOCAL: tl.constexpr, L_BLOCK: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, TAILS: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``sorted_x [R, H]`` → ``inner [R, F]``, silu(gate) * up."""
    if OVERLAPPED:  # before the descriptors: they lie in scratch memory that the launch before this one may still use
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    a = tl.make_tensor_descriptor(sorted_x, [rows, HIDDEN], [HIDDEN, 1], [M, K])
    b = tl.make_tensor_descriptor(gate_up, [LOCAL * 2 * INTERMEDIATE, HIDDEN], [HIDDEN, 1], [N, K])
    c = tl.make_tensor_descriptor(inner, [rows, INTERMEDIATE], [INTERMEDIATE, 1], [M, N])
    if TAILS:
        a_half = tl.make_tensor_descriptor(sorted_x, [rows, HIDDEN], [HIDDEN, 1], [M // 2, K])
        a_quarter = tl.make_tensor_descriptor(sorted_x, [rows, HIDDEN], [HIDDEN, 1], [M // 4, K])
    tiles = _row_tiles(totals, L_BLOCK, M)
    column_tiles: tl.constexpr = (INTERMEDIATE + N - 1) // N
    count = tl.sum(tiles, 0) * column_tiles
    programs = tl.num_programs(0)
    for turn in range((count + programs - 1) // programs):
        # a program's place moves on from turn to turn: else it could be the one that gets all the small tiles
        index = turn * programs + (tl.program_id(0) + turn) % programs
        if index < count:
            expert, row_tile, column_tile = _tile(index, tiles, column_tiles)
            row = (_before(tiles, expert) + row_tile) * M
            column = column_tile * N
            weight_row = expert * (2 * INTERMEDIATE) + column
            left = tl.load(totals + expert) - row_tile * M
            if TAILS and left <= M // 4:
                quarter = _up_tile_of_few(a_quarter, b, row, weight_row, HIDDEN, INTERMEDIATE, M // 4, N, K)
                _store_rows(inner, row, column, quarter, INTERMEDIATE)
            elif TAILS and left <= M // 2:
                half = _up_tile(a_half, b, row, weight_row, HIDDEN, INTERMEDIATE, M // 2, N, K)
                _store_rows(inner, row, column, half, INTERMEDIATE)
            else:
                whole = _up_tile(a, b, row, weight_row, HIDDEN, INTERMEDIATE, M, N, K)
                c.store([row, column], whole.to(c.dtype))


@triton.jit
def _division(tiles, programs, column_tiles: tl.constexpr):
    """How the down product is divided: tiles in ``turns`` of all programs, and ``rest`` tiles that fill no turn. Each of these
    goes to ``sharers`` programs, which add up a part of F each, so that the last turn is the shorter the emptier it is."""
    count = tl.sum(tiles, 0) * column_tiles
    turns = count // programs
    rest = count - turns * programs
    return turns, rest, tl.minimum(programs // tl.maximum(rest, 1), 8)


@triton.jit
def many_down(
    inner, down, totals, results, extra, rows,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, LOCAL: tl.constexpr, L_BLOCK: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``inner [R, F]`` → ``results [R, H]``, save the later parts of shared tiles, which are to be added: they are in
    ``extra [programs, M, N]``, float32."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    a = tl.make_tensor_descriptor(inner, [rows, INTERMEDIATE], [INTERMEDIATE, 1], [M, K])
    b = tl.make_tensor_descriptor(down, [LOCAL * HIDDEN, INTERMEDIATE], [INTERMEDIATE, 1], [N, K])
    c = tl.make_tensor_descriptor(results, [rows, HIDDEN], [HIDDEN, 1], [M, N])
    tiles = _row_tiles(totals, L_BLOCK, M)
    column_tiles: tl.constexpr = (HIDDEN + N - 1) // N
    steps: tl.constexpr = (INTERMEDIATE + K - 1) // K
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    turns, rest, sharers = _division(tiles, programs, column_tiles)
    extra += program.to(tl.int64) * (M * N)
    all_turns = turns + (program < rest * sharers).to(tl.int32)
    for turn in range(all_turns):
        index = turn * programs + (program + turn) % programs
        part = 0
        first_step = 0
        last_step = steps
        if turn == turns:
            index = turn * programs + program % rest
            part = program // rest
            first_step = part * steps // sharers
            last_step = (part + 1) * steps // sharers
        expert, row_tile, column_tile = _tile(index, tiles, column_tiles)
        row = (_before(tiles, expert) + row_tile) * M
        column = column_tile * N
        weight_row = expert * HIDDEN + column
        result = tl.zeros([M, N], tl.float32)
        for step in range(first_step, last_step):
            result = tl.dot(a.load([row, step * K]), b.load([weight_row, step * K]).T, result)
        if part > 0:
            _store_rows(extra, 0 * row, 0, result, N)
        else:
            c.store([row, column], result.to(c.dtype))


@triton.jit
def many_combine(
    results, extra, totals, places, weights, y, programs,
    HIDDEN: tl.constexpr, L_BLOCK: tl.constexpr, TOP_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    H_BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``y [T, H]``: the weighted sum of each token's results and what is to be added to them, in the order of its experts and
    parts. ``places [T, K]``: rows of ``results``, -1 for another rank's; ``programs``: of the down product.

    Program (t, i): ``H_BLOCK`` columns of token t."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    column = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    there = column < HIDDEN
    column_tiles: tl.constexpr = (HIDDEN + N - 1) // N
    tiles = _row_tiles(totals, L_BLOCK, M)
    turns, rest, sharers = _division(tiles, programs, column_tiles)
    total = tl.zeros([H_BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        row = tl.load(places + token * TOP_K + i)
        if row >= 0:
            result = tl.load(results + row.to(tl.int64) * HIDDEN + column, mask=there, other=0.0).to(tl.float32)
            row_tile = row // M
            expert = tl.sum((tl.cumsum(tiles, 0) <= row_tile).to(tl.int32), 0)
            before = _before(tiles, expert)
            shared = before * column_tiles + column // N * _at(tiles, expert) + row_tile - before - turns * programs
            at = extra + (shared * M + row % M).to(tl.int64) * N + column % N
            for part in range(1, sharers):
                result += tl.load(at + part * rest.to(tl.int64) * (M * N), mask=there & (shared >= 0), other=0.0)
            total += tl.load(weights + token * TOP_K + i) * result
    tl.store(y + token.to(tl.int64) * HIDDEN + column, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def sorted_combine(
    results, places, weights, y,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, H_BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """``y [T, H]``: the weighted sum of each token's rows of ``results [R, H]``, in the order of its experts. ``places [T, K]``:
    which rows, -1 for another rank's.

    Program (t, i): ``H_BLOCK`` columns of token t."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    column = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    there = column < HIDDEN
    total = tl.zeros([H_BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        row = tl.load(places + token * TOP_K + i)
        at = results + row.to(tl.int64) * HIDDEN + column
        result = tl.load(at, mask=there & (row >= 0), other=0.0)
        total += tl.load(weights + token * TOP_K + i) * result.to(tl.float32)
    tl.store(y + token.to(tl.int64) * HIDDEN + column, total.to(y.dtype.element_ty), mask=there)
