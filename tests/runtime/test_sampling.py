from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moecompiler.errors import UserError
from moecompiler.runtime.sampling import (
    Sampler,
    SamplingOptions,
    draw,
    filter_logits,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    softmax,
)

RNG = np.random.default_rng(0)
ROWS = [RNG.standard_normal(size).astype(np.float32) * scale for size in (7, 100, 3000) for scale in (0.3, 3.0, 10.0)]


def hf(warper: Any, logits: np.ndarray, history: list[int] | None = None) -> np.ndarray:
    import torch

    ids = torch.tensor([history or [0]])
    return warper(ids, torch.from_numpy(logits)[None].clone())[0].numpy()


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    for logits in ROWS:
        before, history = logits.copy(), [0, 3, 3, 5, 0, 6]
        penalized = penalize_repetition(logits, history, penalty)
        np.testing.assert_array_equal(penalized, hf(RepetitionPenaltyLogitsProcessor(penalty), logits, history))
        np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 50, 10_000])
def test_top_k_is_that_of_transformers(top_k: int) -> None:
    from transformers import TopKLogitsWarper

    for logits in [*ROWS, np.array([1, 3, 3, 2, 3, 0], np.float32)]:
        expected = hf(TopKLogitsWarper(top_k), logits) if top_k else logits
        np.testing.assert_array_equal(keep_top_k(logits, top_k), expected)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_top_p_is_that_of_transformers(top_p: float) -> None:
    from transformers import TopPLogitsWarper

    for logits in ROWS:
        np.testing.assert_array_equal(keep_top_p(logits, top_p), hf(TopPLogitsWarper(top_p), logits))


def test_all_of_them_in_the_order_of_transformers() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for logits in ROWS:
        for temperature, top_k, top_p in [(0.5, 20, 0.9), (2.0, 40, 0.8), (1.3, 3, 0.95)]:
            expected = logits
            for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
                expected = hf(warper, expected)
            ours = filter_logits(logits, SamplingOptions(temperature, top_k, top_p))
            np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
            np.testing.assert_allclose(softmax(ours), softmax(expected), rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(seed=5),
        SamplingOptions(temperature=0.0),
        SamplingOptions(temperature=0.0, top_k=4, top_p=0.5),
        SamplingOptions(temperature=1e-6),
        SamplingOptions(temperature=1e-45),
        SamplingOptions(top_k=1, temperature=3.0),
        SamplingOptions(top_p=1e-9),
    ],
)
def test_greedy(options: SamplingOptions) -> None:
    logits = RNG.standard_normal((4, 50)).astype(np.float32) * 20
    tokens = Sampler(options, 4).choose(logits, [[0]] * 4)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_greedy_search_heeds_the_repetition_penalty() -> None:
    logits = np.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [-5.0, -1.0, -1.5]], np.float32)
    tokens = Sampler(SamplingOptions(repetition_penalty=2.0), 3).choose(logits, [[1], [0, 2], [1, 1]])
    assert tokens.tolist() == [2, 1, 2]


def test_frequencies_are_the_probabilities() -> None:
    """Pearson's statistic over 12 classes; 11 degrees of freedom exceed 31.3 once in a thousand seeds."""
    logits = np.concatenate([RNG.standard_normal(12).astype(np.float32), np.array([-np.inf, -np.inf], np.float32)])
    draws, stream = 20_000, np.random.default_rng(1)
    counts = np.bincount([draw(logits, stream) for _ in range(draws)], minlength=14)
    expected = draws * softmax(logits[:12])
    assert counts[12:].sum() == 0
    assert ((counts[:12] - expected) ** 2 / expected).sum() < 31.3


def test_only_kept_tokens_are_drawn() -> None:
    logits, options = ROWS[4], SamplingOptions(temperature=1.5, top_k=10, top_p=0.8)
    kept = set(np.flatnonzero(np.isfinite(filter_logits(logits, options))).tolist())
    sampler = Sampler(options, 1)
    drawn = {int(sampler.choose(logits[None], [[0]])[0]) for _ in range(300)}
    assert drawn == kept
    assert 1 < len(kept) < 10


def sampled(
    options: SamplingOptions, logits: np.ndarray, first: int = 0, active: list[bool] | None = None
) -> np.ndarray:
    """Tokens ``[steps, batch]`` of ``logits [steps, batch, vocab]``."""
    sampler = Sampler(options, logits.shape[1], first)
    history: list[list[int]] = [[0]] * logits.shape[1]
    return np.stack([sampler.choose(step, history, None if active is None else np.array(active)) for step in logits])


def test_streams_depend_on_the_seed_and_the_sequence_alone() -> None:
    logits = np.broadcast_to(RNG.standard_normal(200).astype(np.float32), (20, 3, 200))
    options = SamplingOptions(temperature=1.0, seed=4)
    together = sampled(options, logits)
    np.testing.assert_array_equal(together, sampled(options, logits))
    for i in range(3):
        np.testing.assert_array_equal(together[:, i : i + 1], sampled(options, logits[:, i : i + 1], first=i))
    np.testing.assert_array_equal(together[:, 2], sampled(options, logits, active=[False, False, True])[:, 2])
    assert (together[:, 0] != together[:, 1]).any()
    assert (together != sampled(SamplingOptions(temperature=1.0, seed=5), logits)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=1.0)])
def test_logits_that_are_not_finite(bad: float, options: SamplingOptions) -> None:
    logits = np.zeros((3, 10), np.float32)
    logits[1, 4] = bad
    with pytest.raises(UserError, match=f"sequence 6: the model's logits hold {bad} after 2 tokens"):
        Sampler(options, 3, first=5).choose(logits, [[1, 2]] * 3)
    active = np.array([True, False, True])
    assert Sampler(options, 3).choose(logits, [[1, 2]] * 3, active)[1] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"top_k": -1}, "--top_k -1"),
        ({"top_p": 0.0}, r"--top_p 0\.0"),
        ({"top_p": 1.01}, r"--top_p 1\.01"),
        ({"repetition_penalty": 0.0}, r"--repetition_penalty 0\.0"),
        ({"seed": -3}, "--seed -3"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingOptions(**values)


@pytest.mark.parametrize("options", [SamplingOptions(temperature=0.9, seed=3), SamplingOptions()])
def test_numbers_drawn_ahead_are_those_drawn_step_by_step(options: SamplingOptions) -> None:
    ahead = Sampler(options, 3, first=2).uniforms(5)
    assert ahead.shape == (5, 3)
    sampler = Sampler(options, 3, first=2)
    logits = np.zeros((3, 1000), np.float32)
    for numbers in ahead:
        np.testing.assert_array_equal(sampler.choose(logits, [[]] * 3), (1000 * numbers).astype(int))
