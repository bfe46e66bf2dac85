"""From logits to tokens without a sort, as ``moecompiler.runtime.sampling`` does it.

``options`` float64: penalty, temperature (0: none), ``1 - top_p`` (0: all), ``top_k`` (0: all). Rows are of ``VOCAB``; ``PARTS``
programs share one where they can, each ``BLOCK`` tokens of it. A token's key is its float32 logit as an integer of the same
order; its weight is ``exp(logit - highest)`` as an integer of 2**-42, so that sums are exact whatever their order.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-2139095041)  # the key of minus infinity
ABOVE = tl.constexpr(2147483647)  # no number has a key that high
ONE = tl.constexpr(4398046511104.0)  # 2**42: sums of 2**20 weights stay below 2**63


@triton.jit
def _part(logits, options, seen, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tokens, their logits in float32, minus infinity outside, and the same after the repetition penalty."""
    row = tl.program_id(0).to(tl.int64) * VOCAB
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = token < VOCAB
    raw = tl.load(logits + row + token, mask=there, other=float("-inf")).to(tl.float32)
    penalty = tl.load(options).to(tl.float32)
    value = raw
    if penalty != 1.0:
        met = tl.load(seen + row + token, mask=there, other=0) != 0
        value = tl.where(met, tl.where(raw < 0, raw * penalty, tl.div_rn(raw, penalty)), raw)
    return token, raw, value


@triton.jit
def _highest(values):
    """The largest, or NaN where any is."""
    missing = tl.max((values != values).to(tl.int32), 0)
    return tl.where(missing != 0, float("nan"), tl.max(tl.where(values != values, float("-inf"), values), 0))


@triton.jit
def _finish(
    token, tops, options, chosen, fed, positions, seen, slots,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` gets its token, or why it has none: the highest logit is NaN (-1), infinity (-2) or minus infinity
    (-3). What is fed next, and where, always is a token and a slot."""
    row = tl.program_id(0)
    part = tl.arange(0, P_BLOCK)
    top = _highest(tl.load(tops + row * PARTS + part, mask=part < PARTS, other=float("-inf")))
    code = tl.where(top != top, -1, tl.where(top == float("inf"), -2, tl.where(top == float("-inf"), -3, 0)))
    valid = tl.minimum(tl.maximum(token, 0), VOCAB - 1).to(tl.int64)
    tl.store(chosen + row, tl.where(code < 0, code.to(tl.int64), valid))
    tl.store(fed + row, valid)
    tl.store(positions + row, tl.minimum(tl.load(positions + row) + 1, slots - 1))
    if tl.load(options) != 1.0:
        tl.store(seen + row.to(tl.int64) * VOCAB + valid, 1)


@triton.jit
def highest(
    logits, options, seen, tops, bests, tokens,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Greedy, the parts: ``tops [rows, PARTS]`` of the logits as they are, ``bests`` after the penalty, their first tokens."""
    token, raw, value = _part(logits, options, seen, VOCAB, BLOCK)
    at = tl.program_id(0) * PARTS + tl.program_id(1)
    tl.store(tops + at, _highest(raw))
    value = tl.where(value != value, float("-inf"), value)
    best = tl.max(value, 0)
    tl.store(bests + at, best)
    tl.store(tokens + at, tl.min(tl.where(value == best, token, VOCAB), 0))


@triton.jit
def choose_highest(
    tops, bests, tokens, options, chosen, fed, positions, seen, slots,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """Greedy, each row: the first token of the highest part."""
    part = tl.arange(0, P_BLOCK)
    there = part < PARTS
    at = tl.program_id(0) * PARTS + part
    best = tl.load(bests + at, mask=there, other=float("-inf"))
    token = tl.load(tokens + at, mask=there, other=VOCAB)
    first = tl.min(tl.where(best == tl.max(best, 0), token, VOCAB), 0)
    _finish(first, tops, options, chosen, fed, positions, seen, slots, VOCAB, PARTS, P_BLOCK)


@triton.jit
def scale(
    logits, options, seen, values, tops, bests,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``values [rows, VOCAB]`` float32: the logits after penalty and temperature; ``tops`` and ``bests`` as in ``highest``."""
    token, raw, value = _part(logits, options, seen, VOCAB, BLOCK)
    temperature = tl.load(options + 1).to(tl.float32)
    if temperature != 0.0:
        value = tl.div_rn(value, temperature)
    at = tl.program_id(0) * PARTS + tl.program_id(1)
    tl.store(values + tl.program_id(0).to(tl.int64) * VOCAB + token, value, mask=token < VOCAB)
    tl.store(tops + at, _highest(raw))
    tl.store(bests + at, tl.max(tl.where(value != value, float("-inf"), value), 0))


@triton.jit
def weigh(
    values, bests, options, keys, weights,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """``keys`` int32 and ``weights`` int64, ``[rows, VOCAB]``, of ``values``. With a temperature the highest is subtracted in
    float32, and what that rounds to the same ties."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, P_BLOCK)
    top = tl.max(tl.load(bests + row * PARTS + part, mask=part < PARTS, other=float("-inf")), 0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = token < VOCAB
    value = tl.load(values + row * VOCAB + token, mask=there, other=float("-inf"))
    below = value.to(tl.float64) - top.to(tl.float64)
    if tl.load(options + 1) != 0.0:
        value = value - top
        below = value.to(tl.float64)
    below = tl.where(below <= 0.0, below, float("-inf"))  # logits that are no numbers: the row's token says so
    value = tl.where(value == 0.0, 0.0, value)  # minus zero ties with zero
    bits = value.to(tl.int32, bitcast=True)
    tl.store(keys + row * VOCAB + token, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), mask=there)
    tl.store(weights + row * VOCAB + token, (tl.exp(below) * ONE + 0.5).to(tl.int64), mask=there)


@triton.jit
def _at_least(keys, bound, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys of a row are not below ``bound``."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        there = token < VOCAB
        key = tl.load(keys + token, mask=there, other=LEAST)
        found += (there & (key >= bound)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def _below(keys, weights, least, bound, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys of a row are from ``least`` to below ``bound``, and their weight."""
    found = tl.zeros([BLOCK], tl.int32)
    weight = tl.zeros([BLOCK], tl.int64)
    for start in range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        there = token < VOCAB
        key = tl.load(keys + token, mask=there, other=LEAST)
        inside = there & (key >= least) & (key < bound)
        found += inside.to(tl.int32)
        weight += tl.load(weights + token, mask=inside, other=0)
    return tl.sum(found, 0), tl.sum(weight, 0)


@triton.jit
def _keep_top_k(keys, top_k, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """A bound at or below the ``top_k``-th key and above the next: what ties with it stays."""
    low = tl.full([], LEAST, tl.int64)
    if (top_k > 0) & (top_k < VOCAB):
        high = tl.full([], ABOVE, tl.int64)
        found = tl.full([], VOCAB, tl.int32)
        while (high - low > 1) & (found != top_k):
            middle = (low + high) >> 1
            many = _at_least(keys, middle.to(tl.int32), VOCAB, BLOCK)
            enough = many >= top_k
            found = tl.where(enough, many, found)
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    return low


@triton.jit
def choose(
    keys, weights, tops, options, uniforms, drawn, chosen, fed, positions, seen, slots, stride,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, P_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row's top-k, top-p and draw, with number ``drawn [row]`` of its column of ``uniforms [slots, stride]`` float64.
    Thresholds are found by bisection over keys, until one key is left, or as many tokens as are wanted."""
    row = tl.program_id(0)
    keys += row.to(tl.int64) * VOCAB
    weights += row.to(tl.int64) * VOCAB
    least = _keep_top_k(keys, tl.load(options + 3).to(tl.int32), VOCAB, BLOCK)
    high = tl.full([], ABOVE, tl.int64)
    many, total = _below(keys, weights, least.to(tl.int32), high.to(tl.int32), VOCAB, BLOCK)

    # the least likely go while their weight is at most this; of those that tie, the first
    spare = (tl.load(options + 2) * total.to(tl.float64)).to(tl.int64)
    low, few, lost = least, many * 0, total * 0
    gone = total
    if spare > 0:
        while (high - low > 1) & (many - few > 1):
            middle = (low + high) >> 1
            count, weight = _below(keys, weights, least.to(tl.int32), middle.to(tl.int32), VOCAB, BLOCK)
            fits = weight <= spare
            few = tl.where(fits, count, few)
            lost = tl.where(fits, weight, lost)
            low = tl.where(fits, middle, low)
            many = tl.where(fits, many, count)
            gone = tl.where(fits, gone, weight)
            high = tl.where(fits, high, middle)
    each = (gone - lost) // tl.maximum(many - few, 1).to(tl.int64)
    ties = tl.where(high - low == 1, (spare - lost) // tl.maximum(each, 1), 0)
    kept = total - lost - ties * each

    index = tl.load(drawn + row)
    uniform = tl.load(uniforms + index * stride + row)
    tl.store(drawn + row, tl.minimum(index + 1, slots - 1))
    aim = tl.minimum((uniform * kept.to(tl.float64)).to(tl.int64), kept - 1)
    passed = total * 0
    tied = total * 0
    token = tl.full([], VOCAB, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        if token == VOCAB:
            at = start + tl.arange(0, BLOCK)
            there = at < VOCAB
            key = tl.load(keys + at, mask=there, other=LEAST)
            tie = (there & (key == low)).to(tl.int64)
            stays = there & (key >= low) & ((tie == 0) | (tied + tl.cumsum(tie, 0) > ties))
            sums = passed + tl.cumsum(tl.load(weights + at, mask=stays, other=0), 0)
            token = tl.min(tl.where(sums > aim, at, VOCAB), 0)
            passed = tl.max(sums, 0)
            tied += tl.sum(tie, 0)
    _finish(token, tops, options, chosen, fed, positions, seen, slots, VOCAB, PARTS, P_BLOCK)
