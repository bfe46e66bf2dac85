"""The reference model and the figures computed from logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moecompiler.backends.base import EngineLimits
from moecompiler.config import PRESETS, ExportOptions, ModelConfig
from moecompiler.dummy import DummyCheckpoint
from moecompiler.mapping import Mapping
from moecompiler.reference import empty_caches, load_rank_module
from moecompiler.validation.difference import logits_differ, outputs_differ, relative_errors
from moecompiler.validation.quality import compare, hf_logits, load_hf
from moecompiler.validation.scenario import Scenario, random_scenario, text_scenario
from moecompiler.validation.tolerances import TOLERANCES

LIMITS = EngineLimits(max_batch_size=4, max_input_len=20, max_seq_len=40, vocab_size=50)


def small_config(**changes: object) -> ModelConfig:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    return ModelConfig(**(PRESETS["8x7b"].__dict__ | sizes | changes))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"rope_scaling_factor": 4.0}])
def test_hf_model_of_dummy_weights_is_the_rank_module(changes: dict[str, object]) -> None:
    config = small_config(**changes)
    reader = DummyCheckpoint(config, 3, "float32")
    scenario = Scenario("random", np.random.default_rng(0).integers(0, 50, (2, 9)), (9, 9), 0)
    expected = hf_logits(load_hf(config, reader.identity(), reader), scenario)[:, 0]
    options = ExportOptions("float32", max_seq_len=16)
    module = load_rank_module(config, Mapping(), 0, options, reader)
    (step,) = scenario.steps()
    logits, _ = module(
        torch.from_numpy(step.input_ids),
        torch.from_numpy(step.position_ids),
        torch.from_numpy(step.last_token_ids),
        empty_caches(config, Mapping(), 0, options, 2),
    )
    assert np.abs(logits.numpy() - expected).max() < 2e-5
    assert np.abs(expected).max() > 0.05


def test_figures_of_known_distributions() -> None:
    """Two tokens with p = (3/4, 1/4) against a uniform guess: KL and perplexity by hand."""
    scenario = Scenario("text", np.array([[0, 0, 1]]), (1,), 1)
    reference = np.log(np.array([[[0.75, 0.25], [0.75, 0.25]]], np.float32))
    quality = compare(np.zeros_like(reference), reference, scenario, TOLERANCES["float32"])
    assert quality.kl == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)
    assert quality.perplexity == pytest.approx(2.0)
    assert quality.hf_perplexity == pytest.approx((0.75 * 0.25) ** -0.5, rel=1e-5)
    assert not quality.passed


def likely_tokens(gaps: list[float], chosen: float) -> tuple[np.ndarray, np.ndarray]:
    """Twelve tokens' logits ``[12, 3]`` of a reference and of a model that differs on the first of them: there the reference has
    its second at ``gap`` below its first, and the model has it ``chosen`` above."""
    reference = np.tile(np.array([4.0, 0.0, -1.0], np.float32), (12, 1))
    logits = reference.copy()
    for token, gap in enumerate(gaps):
        reference[token, 1] = reference[token, 0] - gap
        logits[token, 1] = logits[token, 0] + chosen
    return logits, reference


HALF = TOLERANCES["float16"]


@pytest.mark.parametrize(
    ("gaps", "chosen", "ties", "passed"),
    [
        ([], 0.0, 0, True),
        ([0.02], 0.01, 1, True),
        ([2 * HALF.atol - 1e-3], 0.01, 1, True),
        ([2 * HALF.atol + 1e-3], 0.01, 0, False),  # no tie
        ([0.02], HALF.logits + 0.1, 1, False),  # a tie, and out of bounds all the same
        ([0.02] * 3, 0.01, 3, True),
        ([0.02] * 4, 0.01, 3, False),  # too many
        ([0.02, 0.1], 0.01, 1, False),  # one of each
    ],
)
def test_a_tie_of_two_logits_is_no_other_choice(gaps: list[float], chosen: float, ties: int, passed: bool) -> None:
    logits, reference = likely_tokens(gaps, chosen)
    loose = replace(HALF, kl=1.0, outliers=0.0)
    found = logits_differ(logits, reference, loose)
    assert (found.ties, found.passed) == (ties, passed)
    assert found.top1 == pytest.approx(1 - len(gaps) / 12)
    assert outputs_differ([logits, logits], [reference, reference], loose).ties == 2 * ties


def test_not_finite_is_never_within_tolerance() -> None:
    scenario = Scenario("text", np.array([[0, 0, 1]]), (1,), 1)
    logits = np.zeros((1, 2, 2), np.float32)
    assert compare(logits, logits, scenario, TOLERANCES["float32"]).passed
    assert not compare(np.full_like(logits, np.nan), logits, scenario, TOLERANCES["float32"]).passed


def test_scenario_steps_are_the_tokens_in_order() -> None:
    scenario = random_scenario(LIMITS, seed=1)
    prefill, *decode = scenario.steps()
    assert len({*scenario.prompt_lengths}) > 1
    for row, length in enumerate(scenario.prompt_lengths):
        seen = [*prefill.input_ids[row, :length], *(int(step.input_ids[row, 0]) for step in decode)]
        assert seen == list(scenario.tokens[row, : length + len(decode)])
        assert prefill.last_token_ids[row] == length - 1
        assert [int(step.position_ids[row, 0]) for step in decode] == list(range(length, length + len(decode)))


def test_too_little_text_makes_no_scenario() -> None:
    assert text_scenario([1, 2, 3], LIMITS) is None
    scenario = text_scenario(list(range(50)) * 10, LIMITS)
    assert scenario is not None
    assert scenario.tokens.shape[1] <= LIMITS.max_seq_len
    assert max(scenario.prompt_lengths) <= LIMITS.max_input_len


def test_outliers_are_a_share_of_the_tokens() -> None:
    errors = np.array([0.001] * 58 + [5.0, np.nan])
    assert TOLERANCES["float16"].worst(errors) == 0.001
    assert TOLERANCES["float32"].worst(errors) == np.inf
    assert TOLERANCES["float16"].worst(np.append(errors, [5.0, 5.0])) == 5.0
    assert TOLERANCES["float16"].worst(np.array([np.nan])) == np.inf


def test_a_token_that_a_rank_hardly_touches_is_measured_by_the_others() -> None:
    reference = np.array([[[3.0, 4.0], [0.0, 0.0]]])
    value = reference + np.array([[[0.0, 0.5], [0.0, 0.005]]])
    np.testing.assert_allclose(relative_errors(value, reference), [0.1, 0.005 / (0.01 * 2.5)])
