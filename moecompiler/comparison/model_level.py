"""The whole model: logits, distributions, likely tokens, perplexity, and greedy text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moecompiler.comparison.result import Between, Greedy, GreedyText, Histogram, LogitErrors, ModelLevel, Token
from moecompiler.validation.difference import kl_divergence, log_softmax, relative_error
from moecompiler.validation.scenario import Scenario

EDGES = (0.0, *(10.0**power for power in np.arange(-7, 2.5, 0.5)), float("inf"))
_LIKELY = 5

Texts = Callable[[int], str]
"""A token id as text."""
Generated = tuple[Sequence[Sequence[int]], np.ndarray]
"""Token ids of each prompt's continuation, and the logits ``[prompts, steps, vocab]`` they were chosen from."""


def measure_model(
    reference: np.ndarray,
    logits: Mapping[str, np.ndarray],
    scenario: Scenario,
    text: Texts,
    greedy: tuple[GreedyText, ...] = (),
) -> ModelLevel:
    """``reference`` and, by program, ``logits``: ``[batch, steps, vocab]``."""
    positions = scenario.predicted_positions()
    exact = log_softmax(reference)
    programs = tuple(_errors(name, mine, reference, exact, scenario) for name, mine in logits.items())
    tokens = tuple(
        Token(text(int(scenario.tokens[row, at])), int(scenario.tokens[row, at]), row, int(at), _phase(step))
        for row in range(len(positions))
        for step, at in enumerate(positions[row])
    )
    sides = list(logits.values())
    between = _between(sides[0], sides[1]) if len(sides) > 1 else None
    return ModelLevel(tokens, perplexity(exact, scenario), programs, between, greedy)


def _phase(step: int) -> str:
    return "decode" if step else "prefill"


def perplexity(log_probabilities: np.ndarray, scenario: Scenario) -> float:
    """Of the tokens that follow, where the text goes on; NaN where it does nowhere."""
    targets = scenario.predicted_positions() + 1
    known = targets < scenario.tokens.shape[1]
    following = np.take_along_axis(scenario.tokens, np.where(known, targets, 0), axis=1)
    chosen = np.take_along_axis(log_probabilities, following[..., None], axis=-1)[..., 0]
    return float(np.exp(-chosen[known].mean())) if known.any() else float("nan")


def histogram(errors: np.ndarray) -> Histogram:
    """Of absolute errors; what is no number counts as infinite."""
    counts, _ = np.histogram(np.where(np.isnan(errors), np.inf, errors), np.array(EDGES))
    return Histogram(EDGES, tuple(int(count) for count in counts))


def _errors(name: str, logits: np.ndarray, reference: np.ndarray, exact: np.ndarray, scenario: Scenario) -> LogitErrors:
    finite = bool(np.isfinite(logits).all())
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(logits.astype(np.float64) - reference)
        mine = log_softmax(logits)
        divergence = kl_divergence(exact, mine)
    divergence = np.where(np.isfinite(divergence), np.maximum(divergence, 0.0), np.inf)
    ours, theirs = (np.argsort(-each, axis=-1, kind="stable")[..., :_LIKELY] for each in (logits, reference))
    shared = (ours[..., :, None] == theirs[..., None, :]).any(-1).mean()
    return LogitErrors(
        name,
        histogram(errors),
        float(errors.max()) if finite else float("inf"),
        relative_error(logits, reference),
        tuple(divergence.reshape(-1).tolist()),
        float(divergence.mean()),
        float((ours[..., 0] == theirs[..., 0]).mean()),
        float(shared),
        perplexity(mine, scenario) if finite else float("inf"),
    )


def _between(first: np.ndarray, second: np.ndarray) -> Between:
    with np.errstate(invalid="ignore", over="ignore"):
        on, off = log_softmax(first), log_softmax(second)
        kl = float(kl_divergence(off, on).mean())
        largest = float(np.abs(first.astype(np.float64) - second).max())
    same = float((first.argmax(-1) == second.argmax(-1)).mean())
    return Between(kl if np.isfinite(kl) else float("inf"), same, largest if np.isfinite(largest) else float("inf"))


def greedy_texts(
    prompts: Sequence[Sequence[int]],
    reference: Generated,
    programs: Mapping[str, Generated],
    text: Texts,
    tie: float,
) -> tuple[GreedyText, ...]:
    """Continuations beside each other; ``tie``: the margin, in logits, that rounding may turn round."""
    texts = []
    for index, prompt in enumerate(prompts):
        wanted, exact = reference[0][index], reference[1][index]
        beside = [
            _greedy(name, (ids[index], logits[index]), (wanted, exact), text, tie)
            for name, (ids, logits) in programs.items()
        ]
        spoken = "".join(map(text, prompt))
        texts.append(GreedyText(spoken, len(prompt), tuple(map(text, wanted)), tuple(beside)))
    return tuple(texts)


def _greedy(
    name: str,
    mine: tuple[Sequence[int], np.ndarray],
    theirs: tuple[Sequence[int], np.ndarray],
    text: Texts,
    tie: float,
) -> Greedy:
    (tokens, logits), (wanted, exact) = mine, theirs
    different = [step for step, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b]
    texts = tuple(map(text, tokens))
    if not different:
        return Greedy(name, texts, min(len(tokens), len(wanted)), None, None, True)
    # up to there both have read the same, so their logits are of the same question
    at = different[0]
    margin = float(exact[at][wanted[at]] - exact[at][tokens[at]])
    error = float(np.abs(logits[at].astype(np.float64) - exact[at]).max())
    return Greedy(name, texts, at, margin, error, margin <= tie)
