"""What lies between a layer's projections, as in ``MixtralAttention``; scores, scale and softmax are float32.

``Attention``: rotary embedding, KV cache update and causal grouped-query attention over the cache. ``ContextAttention``:
the same without a cache, over the given tokens alone under an additive mask, as models of Hugging Face export without one.
"""

from __future__ import annotations

from moecompiler.ops import OpSpec, Value

HEADS = """
    # [batch, sequence, heads * head_dim] → [batch, heads, sequence, head_dim]
    one = Constant<value_ints = [1]>()
    copy = Constant<value_ints = [0]>()
    rest = Constant<value_ints = [-1]>()
    heads_scalar = Constant<value_int: int = @num_heads>()
    heads = Reshape(heads_scalar, one)
    kv_heads_scalar = Constant<value_int: int = @num_kv_heads>()
    kv_heads = Reshape(kv_heads_scalar, one)
    split_query = Concat<axis = 0>(copy, copy, heads, rest)
    split_key = Concat<axis = 0>(copy, copy, kv_heads, rest)
    query_rows = Reshape(query, split_query)
    query_heads = Transpose<perm = [0, 2, 1, 3]>(query_rows)
    key_rows = Reshape(key, split_key)
    key_heads = Transpose<perm = [0, 2, 1, 3]>(key_rows)
    value_rows = Reshape(value, split_key)
    value_heads = Transpose<perm = [0, 2, 1, 3]>(value_rows)

    # rotary embedding
    query_low, query_high = Split<axis = -1, num_outputs = 2>(query_heads)
    query_minus = Neg(query_high)
    query_turned = Concat<axis = -1>(query_minus, query_low)
    query_cos = Mul(query_heads, cos)
    query_sin = Mul(query_turned, sin)
    query_rotated = Add(query_cos, query_sin)
    key_low, key_high = Split<axis = -1, num_outputs = 2>(key_heads)
    key_minus = Neg(key_high)
    key_turned = Concat<axis = -1>(key_minus, key_low)
    key_cos = Mul(key_heads, cos)
    key_sin = Mul(key_turned, sin)
    key_rotated = Add(key_cos, key_sin)
"""

_CACHE_UPDATE = """
    # cache slots position_ids receive the new keys and values
    slot_axes = Constant<value_ints = [1, 3]>()
    slot_rows = Unsqueeze(position_ids, slot_axes)
    key_shape = Shape(key_rotated)
    slots = Expand(slot_rows, key_shape)
    present_key = ScatterElements<axis = 2>(past_key, slots, key_rotated)
    present_value = ScatterElements<axis = 2>(past_value, slots, value_heads)
"""


def scores(keys: str, queries: str = "query_rotated") -> str:
    """``[batch, kv_heads, group, sequence, slots]`` float32, of heads ``[batch, heads, sequence, head_dim]``."""
    return f"""
    # query heads that share a key-value head form one matrix
    head_dim = Shape<start = 3>({keys})
    group_shape = Concat<axis = 0>(copy, kv_heads, rest, head_dim)
    grouped = Reshape({queries}, group_shape)
    key_columns = Transpose<perm = [0, 1, 3, 2]>({keys})
    products = MatMul(grouped, key_columns)
    wide = Cast<to = 1>(products)
    scale_factor = Constant<value_float: float = @scale>()
    scaled = Mul(wide, scale_factor)
    length = Shape<start = 2, end = 3>(query_rotated)
    capacity = Shape<start = 2, end = 3>({keys})
    scores_shape = Concat<axis = 0>(copy, copy, rest, length, capacity)
    scores = Reshape(scaled, scores_shape)
"""


CAUSAL = """
    # a query sees the slots up to its own, at most window of them
    query_axes = Constant<value_ints = [1, 2, 4]>()
    query_slot = Unsqueeze(position_ids, query_axes)
    zero = Constant<value_int = 0>()
    step = Constant<value_int = 1>()
    first_axis = Constant<value_ints = [0]>()
    capacity_scalar = Squeeze(capacity, first_axis)
    slot = Range(zero, capacity_scalar, step)
    past = LessOrEqual(slot, query_slot)
    window_size = Constant<value_int: int = @window>()
    oldest = Sub(query_slot, window_size)
    recent = Greater(slot, oldest)
    unlimited = LessOrEqual(window_size, zero)
    within = Or(recent, unlimited)
    seen = And(past, within)
    lowest = Constant<value_float = -3.4028234663852886e38>()
    masked = Where(seen, scores, lowest)
"""

_GIVEN_MASK = """
    group_axis = Constant<value_ints = [2]>()
    mask_groups = Unsqueeze(mask, group_axis)
    wide_mask = Cast<to = 1>(mask_groups)
    masked = Add(scores, wide_mask)
"""

SHARES = """
    shares = Softmax<axis = -1>(masked)
"""

# A given mask may hide everything from a query (padding on the left, say): then it gets 0, as in torch's
# scaled_dot_product_attention. A causal mask never does.
_GUARDED_SHARES = """
    exact_shares = Softmax<axis = -1>(masked)
    undefined = IsNaN(exact_shares)
    no_share = Constant<value_float = 0.0>()
    shares = Where(undefined, no_share, exact_shares)
"""


def mixed(values: str) -> str:
    """The output from ``shares``."""
    return f"""
    weights = CastLike(shares, query)
    weights_shape = Concat<axis = 0>(copy, copy, rest, capacity)
    weight_rows = Reshape(weights, weights_shape)
    mixed = MatMul(weight_rows, {values})
    mixed_shape = Concat<axis = 0>(copy, heads, rest, head_dim)
    mixed_heads = Reshape(mixed, mixed_shape)
    mixed_rows = Transpose<perm = [0, 2, 1, 3]>(mixed_heads)
    output_shape = Concat<axis = 0>(copy, copy, rest)
    output = Reshape(mixed_rows, output_shape)
"""


CACHE = ("batch", "kv_heads", "slots", "head_dim")

ATTENTION = OpSpec(
    name="Attention",
    inputs=(
        Value("query", ("batch", "sequence", "query_size")),
        Value("key", ("batch", "sequence", "key_size")),
        Value("value", ("batch", "sequence", "key_size")),
        Value("cos", ("batch", "1", "sequence", "head_dim")),
        Value("sin", ("batch", "1", "sequence", "head_dim")),
        Value("position_ids", ("batch", "sequence"), "int64"),
        Value("past_key", CACHE),
        Value("past_value", CACHE),
    ),
    outputs=(
        Value("output", ("batch", "sequence", "query_size")),
        Value("present_key", CACHE),
        Value("present_value", CACHE),
    ),
    attributes={"num_heads": int, "num_kv_heads": int, "scale": float, "window": int},
    body=HEADS + _CACHE_UPDATE + scores("present_key") + CAUSAL + SHARES + mixed("present_value"),
)

CONTEXT_ATTENTION = OpSpec(
    name="ContextAttention",
    inputs=(
        Value("query", ("batch", "sequence", "query_size")),
        Value("key", ("batch", "sequence", "key_size")),
        Value("value", ("batch", "sequence", "key_size")),
        Value("cos", ("1", "1", "sequence", "head_dim")),
        Value("sin", ("1", "1", "sequence", "head_dim")),
        Value("mask", ("batch", "1", "sequence", "sequence")),
    ),
    outputs=(Value("output", ("batch", "sequence", "query_size")),),
    attributes={"num_heads": int, "num_kv_heads": int, "scale": float},
    body=HEADS + scores("key_rotated") + _GIVEN_MASK + _GUARDED_SHARES + mixed("value_heads"),
)
