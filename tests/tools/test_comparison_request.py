"""What ``compare``'s options say, and the text they choose."""

from __future__ import annotations

import numpy as np
import pytest

from moecompiler.backends.base import EngineLimits
from moecompiler.comparison.result import LEVELS
from moecompiler.errors import UserError
from moecompiler.tools.comparison.request import (
    Text,
    parse_fail_on,
    parse_layers,
    parse_levels,
    parse_ops,
    prompts_of,
    scenario_of,
)

TEXT = Text(tuple(range(500)), str, "numbers")


def test_lists() -> None:
    assert parse_levels("op, routing,op") == ("op", "routing")
    assert parse_fail_on("any") == LEVELS
    assert parse_fail_on("none") == ()
    assert parse_fail_on("model,layer") == ("model", "layer")
    assert parse_ops(None) is None
    assert parse_ops("moe,AddRMSNorm,MoEInt8") == ("moe", "addrmsnorm", "moeint8")
    assert parse_layers(None, 4) is None
    assert parse_layers("3, 0-1,1", 4) == (3, 0, 1)


@pytest.mark.parametrize(
    ("text", "line"),
    [("4", "the model has layers 0 to 3"), ("x", "give numbers"), ("1-", "give numbers"), ("-1", "give numbers")],
)
def test_layers_that_are_not_there(text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse_layers(text, 4)


def test_text_is_a_ragged_batch_of_windows() -> None:
    scenario = scenario_of(TEXT, EngineLimits(4, 30, 40, 500), 96, 0)
    assert scenario.tokens.shape == (4, 24)
    assert scenario.prompt_lengths == (12, 11, 10, 9)
    assert scenario.decode_steps == 12
    np.testing.assert_array_equal(scenario.tokens.reshape(-1), np.arange(96))
    assert scenario_of(TEXT, EngineLimits(1, 5, 12, 500), 96, 0).tokens.shape == (1, 12)
    assert scenario_of(TEXT, EngineLimits(1, 5, 12, 500), 96, 0).prompt_lengths == (5,)


def test_without_text_tokens_are_random_and_the_same() -> None:
    nothing, limits = Text((), str, "none"), EngineLimits(4, 30, 40, 50)
    first, second = (scenario_of(nothing, limits, 64, 3) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert first.tokens.max() < 50
    assert (first.tokens != scenario_of(nothing, limits, 64, 4).tokens).any()
    assert prompts_of(nothing, limits, 2, 8) == []


def test_prompts_fit_the_engine() -> None:
    prompts = prompts_of(TEXT, EngineLimits(4, 9, 20, 500), 3, 12)
    assert [len(prompt) for prompt in prompts] == [6, 8, 8]
    assert prompts[0][0] == 125
    assert prompts_of(TEXT, EngineLimits(4, 9, 20, 500), 0, 12) == []
