"""A result as JSON and back, with numbers that JSON does not have."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from moecompiler.comparison.result import Check, Meta, OpCase, OpLevel, Result, Ulps

META = Meta("m", 2, 4, 2, "float16", "none", "tp1", "onnxruntime", "text.txt", 0, 8, 4, "CPU", "2026-11-25", {}, ())
CASE = OpCase(
    "model.layers.0.mlp/MoE",
    "MoE",
    0,
    "model.layers.0.mlp",
    "y",
    "real",
    8,
    "float16",
    {"plugins": Ulps(math.inf, math.nan, 1.0, 0.5)},
    None,
    (0.5, 1.5),
    False,
    {"plugins": 0.25},
)
RESULT = Result(META, OpLevel((CASE,), ()), None, None, None, (Check("op", "ratio", "n", math.inf, 1.0, False),))


def test_comes_back_from_strict_json() -> None:
    text = json.dumps(RESULT.to_json(), allow_nan=False)
    back = Result.from_json(json.loads(text))
    assert json.dumps(back.to_json()) == text
    assert back.op is not None
    assert math.isnan(back.op.cases[0].errors["plugins"].mean)
    assert back.op.cases[0].interval == (0.5, 1.5)
    assert replace(back, op=None) == replace(RESULT, op=None)


def test_says_what_failed() -> None:
    assert not RESULT.passed
    assert RESULT.failed_levels() == ("op",)
    assert RESULT.to_json()["passed"] is False
    assert replace(RESULT, verdict=()).passed


def test_what_is_no_result_is_refused() -> None:
    data = RESULT.to_json()
    with pytest.raises(ValueError, match="meta"):
        Result.from_json({key: value for key, value in data.items() if key != "meta"})
