"""The kernels of sampling, run by Triton's interpreter, choose what ``runtime.sampling`` chooses."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch
from interpreted import interpret, interpreter

from moecompiler.errors import UserError
from moecompiler.plugins.sampling.launch import SamplingTactic
from moecompiler.runtime.sampling import Sampler, SamplingOptions, device_options

SLOTS = 8
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@pytest.fixture(scope="module")
def interpreting() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as pool:
        yield pool


def chosen(
    pool: ProcessPoolExecutor,
    steps: np.ndarray,
    options: SamplingOptions,
    history: list[list[int]],
    dtype: str = "float32",
    stride: int = 0,
) -> np.ndarray:
    """Tokens ``[steps, batch]`` of ``logits [steps, batch, vocab]``, one launch after another; and checks what is handed on."""
    count, batch, vocab = steps.shape
    tactic = SamplingTactic("greedy" if options.greedy else "drawn", vocab, dtype)
    uniforms = np.full((SLOTS, stride or batch), np.nan)
    uniforms[:count, :batch] = Sampler(options, batch).uniforms(count)
    seen = np.zeros((batch, vocab), np.uint8)
    for row, tokens in zip(seen, history, strict=True):
        row[tokens] = 1
    state = [np.zeros(batch, np.int64), np.arange(batch) + SLOTS - 4, seen]
    tokens = []
    for logits in steps:
        typed = torch.from_numpy(logits.astype(np.float32)).to(getattr(torch, dtype))
        inputs = [typed, *map(torch.from_numpy, (device_options(options), uniforms, *state))]
        fresh = [torch.full((batch,), -9), torch.full((batch,), -9)]
        task = pool.submit(interpret, "", {}, dtype, inputs, [*fresh, 3, 4, 5], tactic)
        got, fed, *after = [value.numpy() for value in task.result()]
        np.testing.assert_array_equal(fed[got >= 0], got[got >= 0])
        assert ((fed >= 0) & (fed < vocab)).all()
        np.testing.assert_array_equal(after[1], np.minimum(state[1] + 1, SLOTS - 1))
        state = [np.array(value) for value in after]
        tokens.append(got)
    return np.stack(tokens)


def wanted(steps: np.ndarray, options: SamplingOptions, history: list[list[int]], dtype: str = "float32") -> np.ndarray:
    sampler, history, tokens = Sampler(options, steps.shape[1]), [list(each) for each in history], []
    for logits in steps.astype(TYPES[dtype]).astype(np.float32):
        tokens.append(sampler.choose(logits, history))
        for row, token in zip(history, tokens[-1], strict=True):
            row.append(int(token))
    return np.stack(tokens)


@pytest.mark.parametrize(
    ("vocab", "dtype", "options"),
    [
        (2050, "float16", SamplingOptions()),
        (100, "bfloat16", SamplingOptions(repetition_penalty=1.7)),
        (1536, "float32", SamplingOptions(temperature=0.7, seed=1)),
        (1536, "float16", SamplingOptions(top_k=40, seed=2)),
        (9000, "bfloat16", SamplingOptions(top_p=0.8, seed=3)),
        (2050, "float32", SamplingOptions(temperature=1.3, top_k=50, top_p=0.9, seed=4, repetition_penalty=1.2)),
        (100, "float16", SamplingOptions(temperature=3.0, top_k=5000, top_p=0.05, seed=5, repetition_penalty=0.6)),
    ],
    ids=str,
)
def test_tokens(vocab: int, dtype: str, options: SamplingOptions, interpreting: ProcessPoolExecutor) -> None:
    """Three rows, two steps; float16 and bfloat16 have many ties."""
    steps = 4 * np.random.default_rng(vocab).standard_normal((2, 3, vocab))
    history = [[0, 5, 5], [vocab - 1], list(range(0, vocab, 3))]
    got = chosen(interpreting, steps, options, history, dtype, stride=5)
    np.testing.assert_array_equal(got, wanted(steps, options, history, dtype))


@pytest.mark.parametrize(
    "options",
    [SamplingOptions(top_k=3), SamplingOptions(top_p=0.53), SamplingOptions(temperature=0.5, top_k=6, top_p=0.71)],
    ids=str,
)
def test_ties(options: SamplingOptions, interpreting: ProcessPoolExecutor) -> None:
    """A handful of values, so that thresholds fall into ties, zeros of both signs among them; and tokens that cannot be."""
    rng = np.random.default_rng(0)
    steps = rng.choice(np.array([-np.inf, -1.0, -0.0, 0.0, 1.0]), (2, 9, 120), p=[0.4, 0.2, 0.1, 0.1, 0.2])
    steps[:, 3], steps[:, 4] = 2.0, np.where(np.arange(120) == 77, 0.0, -np.inf)
    history: list[list[int]] = [[]] * 9
    got = chosen(interpreting, steps, options, history)
    np.testing.assert_array_equal(got, wanted(steps, options, history))
    assert len(np.unique(got)) > 8


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(top_k=9, top_p=0.9)], ids=str)
def test_logits_that_are_not_finite(options: SamplingOptions, interpreting: ProcessPoolExecutor) -> None:
    """Rows without a finite maximum say why; the others are as they were."""
    steps = np.random.default_rng(1).standard_normal((1, 5, 1100))
    good = chosen(interpreting, steps, options, [[]] * 5)[0]
    steps[0, 1, 1050], steps[0, 2, 3], steps[0, 3] = np.nan, np.inf, -np.inf
    got = chosen(interpreting, steps, options, [[]] * 5)[0]
    assert got.tolist() == [good[0], -1, -2, -3, good[4]]
    sampler = Sampler(options, 5, first=7)
    for row, word in ((1, "nan"), (2, "inf"), (3, "-inf")):
        active = np.arange(5) == row
        with pytest.raises(UserError, match=f"sequence {7 + row}: the model's logits hold {word} after 2 tokens"):
            sampler.check(got, [[1, 2]] * 5, active)
    assert sampler.check(got, [[1, 2]] * 5, np.arange(5) % 4 == 0).tolist() == [good[0], 0, 0, 0, good[4]]
