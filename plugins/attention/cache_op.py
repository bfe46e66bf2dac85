"""``Attention`` over a KV cache of codes: ``AttentionInt8Cache``, ``AttentionFp8Cache``, and ``AttentionFp8Context``.

A code is a byte, ``int8`` for both formats: an integer from -127 to 127, or the bits of an E4M3 number (OCP 8-bit floating point,
1.0), whose sign is the byte's. TensorRT takes no FP8 tensor from outside but into ``DequantizeLinear`` (RTX 1.7), casts none
(10.6), and takes none into ``ScatterElements``; nor does ONNX. So what encodes and decodes is written out, in arithmetic that is
exact, and bytes are scattered as numbers of the op's own type, which holds them exactly.

Keys (after rotary embedding) and values are divided by a scale of the layer's, in float32, and rounded to the nearest code, ties
to even, saturating. What attention reads are numbers that codes stand for, code times scale rounded to the op's type; those of
the tokens just written too, so prefill and decode see the same.

``AttentionFp8Context`` has an FP8 cache, and where a sequence has several new tokens both products are of E4M3 numbers: queries
are rounded as they are, and of the softmax, in base 2, ``256 * 2^(score - ceil(largest score))``. That base is a power of two, so
a kernel that meets a larger score later changes no digit of what it has rounded before. One new token is computed as in
``AttentionFp8Cache``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from moecompiler.ops import OpSpec, Value
from moecompiler.plugins.attention.op import ATTENTION, CACHE, CAUSAL, HEADS, SHARES, mixed, scores
from moecompiler.quantization.encodings import decode_e4m3
from moecompiler.quantization.schemes import Format

# E4M3's exponents, from that of its subnormal numbers: eight steps to the next one
_EXPONENTS = range(-6, 9)
# of the bytes that are -128 to 127 as integers; nothing writes the two of NaN
_NUMBERS = np.nan_to_num(decode_e4m3(np.arange(-128, 128).astype(np.int8)), nan=0.0)


def _list(values: Iterable[float]) -> str:
    return ", ".join(repr(float(value)) for value in values)


# Of a float32 {x}: its magnitude, saturated, and how many of E4M3's steps at its exponent that is. Where the logarithm errs,
# beside a power of two, it is one step more or less of another size, which is the same.
_STEPS = """
    {x}_limit = Constant<value_float = 448.0>()
    {x}_sized = Abs({x})
    {x}_magnitude = Min({x}_sized, {x}_limit)
    {x}_least = Constant<value_float = 0.015625>()
    {x}_normal = Max({x}_magnitude, {x}_least)
    {x}_logarithm = Log({x}_normal)
    {x}_per_octave = Constant<value_float = 1.4426950408889634>()
    {x}_octaves = Mul({x}_logarithm, {x}_per_octave)
    {x}_exponent = Floor({x}_octaves)
    {x}_lowest = Constant<value_float = 6.0>()
    {x}_octave = Add({x}_exponent, {x}_lowest)
    {x}_octave_index = Cast<to = 6>({x}_octave)
    {x}_steps_table = Constant<value_floats = [PER_STEP]>()
    {x}_per_step = Gather({x}_steps_table, {x}_octave_index)
    {x}_in_steps = Mul({x}_magnitude, {x}_per_step)
    {x}_steps = Round({x}_in_steps)
""".replace("PER_STEP", _list(2.0 ** (3 - e) for e in _EXPONENTS))

# the byte, as a number of type float32
_ENCODED_E4M3 = (
    _STEPS
    + """
    {x}_eight = Constant<value_float = 8.0>()
    {x}_before = Mul({x}_octave, {x}_eight)
    {x}_code = Add({x}_before, {x}_steps)
    {x}_nothing = Constant<value_float = 0.0>()
    {x}_negative = Less({x}, {x}_nothing)
    {x}_sign_bit = Constant<value_float = 128.0>()
    {x}_code_below = Sub({x}_code, {x}_sign_bit)
    {y} = Where({x}_negative, {x}_code_below, {x}_code)
"""
)

_ROUNDED_E4M3 = (
    _STEPS
    + """
    {x}_sign = Sign({x})
    {x}_rounded_magnitude = Div({x}_steps, {x}_per_step)
    {y} = Mul({x}_sign, {x}_rounded_magnitude)
"""
)

_ENCODED_INT8 = """
    {x}_limit = Constant<value_float = 127.0>()
    {x}_lower_limit = Neg({x}_limit)
    {x}_low = Max({x}, {x}_lower_limit)
    {x}_clipped = Min({x}_low, {x}_limit)
    {y} = Round({x}_clipped)
"""

_DECODED_E4M3 = """
    {x}_bytes = Cast<to = 6>({x})
    {x}_first_float = Constant<value_float = 128.0>()
    {x}_first = Cast<to = 6>({x}_first_float)
    {x}_index = Add({x}_bytes, {x}_first)
    {x}_table_floats = Constant<value_floats = [TABLE]>()
    {x}_table = CastLike({x}_table_floats, {x})
    {y} = Gather({x}_table, {x}_index)
""".replace("TABLE", _list(_NUMBERS))

_DECODED_INT8 = """
    {y} = Identity({x})
"""


def _update(kind: str, new: str, form: Format) -> str:
    """From ``past_{kind}`` and ``new``, for ``slots``, to ``present_{kind}`` and the numbers that it stands for,
    ``{kind}s_read``."""
    encoded, decoded = (_ENCODED_E4M3, _DECODED_E4M3) if form is Format.E4M3 else (_ENCODED_INT8, _DECODED_INT8)
    return (
        f"""
    {kind}_wide = Cast<to = 1>({new})
    {kind}_wide_scale = Cast<to = 1>({kind}_scales)
    {kind}_quotient = Div({kind}_wide, {kind}_wide_scale)
"""
        + encoded.format(x=f"{kind}_quotient", y=f"{kind}_codes")
        + f"""
    {kind}_new_codes = CastLike({kind}_codes, {new})
    {kind}_past_codes = CastLike(past_{kind}, {new})
    {kind}_all_codes = ScatterElements<axis = 2>({kind}_past_codes, slots, {kind}_new_codes)
    present_{kind} = Cast<to = 3>({kind}_all_codes)
"""
        + decoded.format(x=f"{kind}_all_codes", y=f"{kind}_numbers")
        + f"""
    {kind}s_read = Mul({kind}_numbers, {kind}_scales)
"""
    )


_SLOTS = """
    # cache slots position_ids receive the new keys and values
    slot_axes = Constant<value_ints = [1, 3]>()
    slot_rows = Unsqueeze(position_ids, slot_axes)
    key_shape = Shape(key_rotated)
    slots = Expand(slot_rows, key_shape)
"""

SHARE_SCALE = 256.0
"""What a share of 1 is multiplied with before it is rounded to E4M3."""

_SEVERAL = (
    """
    new_tokens = Shape<start = 1, end = 2>(position_ids)
    one_token = Constant<value_ints = [1]>()
    several = Greater(new_tokens, one_token)
    query_wide = Cast<to = 1>(query_rotated)
"""
    + _ROUNDED_E4M3.format(x="query_wide", y="query_rounded")
    + """
    query_context = Where(several, query_rounded, query_wide)
    query_taken = CastLike(query_context, query)
"""
)

_CONTEXT_SHARES = (
    f"""
    to_base_2 = Constant<value_float = {math.log2(math.e)!r}>()
    to_base_e = Constant<value_float = {math.log(2)!r}>()
    in_base_2 = Mul(masked, to_base_2)
    last_axis = Constant<value_ints = [-1]>()
    highest = ReduceMax(in_base_2, last_axis)
    base = Ceil(highest)
    below = Sub(in_base_2, base)
    exponents = Mul(below, to_base_e)
    powers = Exp(exponents)
    total = ReduceSum(powers, last_axis)
    share_scale = Constant<value_float = {SHARE_SCALE}>()
    scaled_powers = Mul(powers, share_scale)
"""
    + _ROUNDED_E4M3.format(x="scaled_powers", y="rounded_powers")
    + """
    taken_powers = Where(several, rounded_powers, scaled_powers)
    scaled_shares = Div(taken_powers, total)
    shares = Div(scaled_shares, share_scale)
"""
)


def _spec(name: str, body: str) -> OpSpec:
    """``Attention`` with a cache of bytes and its scales."""
    codes = {value.name: "int8" for value in (*ATTENTION.inputs, *ATTENTION.outputs) if value.dims == CACHE}

    def typed(values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(Value(value.name, value.dims, codes.get(value.name, value.type)) for value in values)

    scales = (Value("key_scales", ("1",)), Value("value_scales", ("1",)))
    return OpSpec(name, (*typed(ATTENTION.inputs), *scales), typed(ATTENTION.outputs), ATTENTION.attributes, body)


def _cached(form: Format) -> str:
    return HEADS + _SLOTS + _update("key", "key_rotated", form) + _update("value", "value_heads", form)


ATTENTION_INT8_CACHE = _spec(
    "AttentionInt8Cache", _cached(Format.INT8) + scores("keys_read") + CAUSAL + SHARES + mixed("values_read")
)
ATTENTION_FP8_CACHE = _spec(
    "AttentionFp8Cache", _cached(Format.E4M3) + scores("keys_read") + CAUSAL + SHARES + mixed("values_read")
)
ATTENTION_FP8_CONTEXT = _spec(
    "AttentionFp8Context",
    _cached(Format.E4M3)
    + _SEVERAL
    + scores("keys_read", "query_taken")
    + CAUSAL
    + _CONTEXT_SHARES
    + mixed("values_read"),
)
ATTENTION_SPECS = (ATTENTION_INT8_CACHE, ATTENTION_FP8_CACHE, ATTENTION_FP8_CONTEXT)


def cache_spec(form: Format, fp8_context: bool = False) -> OpSpec:
    """The op for a cache of this format, E4M3 or INT8; ``fp8_context`` goes with E4M3."""
    if form is Format.INT8:
        return ATTENTION_INT8_CACHE
    return ATTENTION_FP8_CONTEXT if fp8_context else ATTENTION_FP8_CACHE


def update_spec(form: Format) -> OpSpec:
    """``UpdateInt8Cache``, ``UpdateFp8Cache``: what is done with the cache of keys, or of values, alone; for graphs in which
    attention is no op. ``new [batch, kv_heads, sequence, head_dim]`` goes to ``slots`` of the same shape."""
    new = Value("new", ("batch", "kv_heads", "sequence", "head_dim"))
    return OpSpec(
        "UpdateInt8Cache" if form is Format.INT8 else "UpdateFp8Cache",
        (Value("past_key", CACHE, "int8"), Value("slots", new.dims, "int64"), new, Value("key_scales", ("1",))),
        (Value("present_key", CACHE, "int8"), Value("keys_read", CACHE)),
        {},
        _update("key", "new", form),
    )


CACHE_SPECS = (*ATTENTION_SPECS, *(update_spec(form) for form in (Format.INT8, Format.E4M3)))
