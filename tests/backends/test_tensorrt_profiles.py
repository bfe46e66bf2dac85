"""Limits to optimization profiles, and batches to buckets."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.tensorrt_profiles import DECODE, PREFILL, bucket_of, buckets, prefill_rows, profiles
from moecompiler.errors import UserError

INPUTS = [
    helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
    helper.make_tensor_value_info("last_token_ids", TensorProto.INT64, ["batch"]),
    helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT16, ["batch", 2, 128, 8]),
    helper.make_tensor_value_info("expert_weights", TensorProto.FLOAT16, [8, 16, 32]),
]


def test_two_profiles() -> None:
    made = profiles(INPUTS, EngineLimits(6, 101, 128, 64))
    assert made[PREFILL] == {
        "input_ids": ((1, 1), (6, 51), (6, 101)),
        "last_token_ids": ((1,), (6,), (6,)),
        "past_key_values.0.key": ((1, 2, 128, 8), (6, 2, 128, 8), (6, 2, 128, 8)),
    }
    assert made[DECODE] == {
        "input_ids": ((1, 1), (6, 1), (6, 1)),
        "last_token_ids": ((1,), (6,), (6,)),
        "past_key_values.0.key": ((1, 2, 128, 8), (6, 2, 128, 8), (6, 2, 128, 8)),
    }


@pytest.mark.parametrize(
    ("batch", "length", "tokens", "rows"),
    [(8, 100, 800, 8), (8, 100, 799, 7), (8, 100, 100, 1), (1, 1, None, 1), (64, 2048, None, 4), (2, 16384, None, 1)],
)
def test_a_step_holds_no_more_than_its_tokens(batch: int, length: int, tokens: int | None, rows: int) -> None:
    limits = EngineLimits(batch, length, length + 1, 64, tokens)
    assert prefill_rows(limits) == rows
    assert profiles(INPUTS, limits)[PREFILL]["input_ids"][2] == (rows, length)
    assert profiles(INPUTS, limits)[DECODE]["input_ids"][2] == (batch, 1)


def test_other_free_dimensions_are_refused() -> None:
    strange = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "width"])
    with pytest.raises(UserError, match="input x has the dimension width"):
        profiles([strange], EngineLimits(1, 1, 2, 64))


def test_buckets() -> None:
    assert [buckets(n) for n in (1, 2, 3, 8, 9)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 8), (1, 2, 4, 8, 9)]
    for largest in range(1, 40):
        for batch in range(1, largest + 1):
            assert batch <= bucket_of(batch, largest) <= min(largest, 2 * batch - 1)
