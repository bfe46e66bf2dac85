"""From logits to tokens, in numpy: greedy, or temperature, top-k and top-p as ``transformers`` applies them.

The filters mirror ``transformers.generation.logits_process`` and come in the order of its ``generate``: repetition penalty,
temperature, top-k, top-p, then one draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moecompiler.errors import UserError

_TINY_TEMPERATURE = 1e-30  # divided by less, logits may overflow; at this, the nearest ones are as far apart as can be
_NOT_FINITE = {-1: math.nan, -2: math.inf, -3: -math.inf}


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen: the most likely one, unless ``temperature``, ``top_k`` or ``top_p`` is given.

    ``temperature`` divides the logits (0: the most likely token); ``top_k`` keeps the k most likely tokens (0: all, 1: the
    most likely); ``top_p`` then keeps the fewest tokens whose probabilities sum to it. ``repetition_penalty`` divides
    positive and multiplies negative logits of tokens already in the sequence, prompt included, in greedy search too.

    Raises: UserError where a value is out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature {self.temperature}: give a positive number, or 0 for the most likely token")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: give the number of tokens to choose from, or 0 for all of them")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: give a probability above 0 and at most 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(
                f"--repetition_penalty {self.repetition_penalty}: give a positive number; 1 changes nothing"
            )
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: give an integer that is not negative")

    @property
    def greedy(self) -> bool:
        asked = (self.temperature, self.top_k, self.top_p) != (None, None, None)
        cold = self.temperature is not None and self.temperature < _TINY_TEMPERATURE
        return not asked or cold or self.top_k == 1


def device_options(options: SamplingOptions) -> np.ndarray:
    """The options as numbers for a device that samples, float64 ``[4]``: the penalty, the temperature (0: none), what probability
    ``top_p`` leaves over (0: it keeps all), ``top_k`` (0: all)."""
    spare = 0.0 if options.top_p is None else 1 - options.top_p
    return np.array([options.repetition_penalty, options.temperature or 0.0, spare, options.top_k or 0], np.float64)


class Sampler:
    """Chooses tokens for a batch. Sequence ``first + i`` draws from a stream of its own, spawned from the seed: what it gets
    depends neither on the other sequences nor on how many of them are run at once."""

    def __init__(self, options: SamplingOptions, batch: int, first: int = 0):
        self.options = options
        self._first = first
        self._streams = [
            np.random.default_rng(np.random.SeedSequence(options.seed, spawn_key=(first + i,))) for i in range(batch)
        ]

    def choose(self, logits: np.ndarray, history: list[list[int]], active: np.ndarray | None = None) -> np.ndarray:
        """``logits [batch, vocab]`` float32 and each sequence's tokens so far, prompt included → tokens ``[batch]`` int64.

        Rows that are not ``active`` (bool ``[batch]``) are not looked at: their token is 0.

        Raises: UserError where the logits of an active row have no finite maximum.
        """
        tokens = np.zeros(len(logits), np.int64)
        for i in range(len(logits)) if active is None else np.flatnonzero(active).tolist():
            top = logits[i].max()  # NaN where any is
            if not np.isfinite(top):
                raise self._not_finite(i, top, len(history[i]))
            tokens[i] = self._choose_one(logits[i], history[i], self._streams[i])
        return tokens

    def uniforms(self, steps: int) -> np.ndarray:
        """What the next ``steps`` draws of each sequence take, ``[steps, batch]`` float64 of [0, 1), for a device that draws in
        this sampler's stead: they depend on no logits. Greedy search draws none: zeros."""
        if self.options.greedy:
            return np.zeros((steps, len(self._streams)))
        return np.stack([stream.random(steps) for stream in self._streams], axis=1)

    def check(self, tokens: np.ndarray, history: list[list[int]], active: np.ndarray) -> np.ndarray:
        """What a device chose, as ``choose`` would give it: ``tokens [batch]``, of which -1, -2 and -3 say that the row's highest
        logit was NaN, infinity or minus infinity.

        Raises: UserError where an active row's is.
        """
        for i in np.flatnonzero(active & (tokens < 0)).tolist():
            raise self._not_finite(i, _NOT_FINITE[int(tokens[i])], len(history[i]))
        return np.where(active, tokens, 0)

    def _not_finite(self, i: int, top: float, tokens: int) -> UserError:
        return UserError(
            f"sequence {self._first + i}: the model's logits hold {top} after {tokens} tokens;"
            " its weights are damaged, or its numbers leave the range of its dtype: try --dtype bfloat16 or float32"
        )

    def _choose_one(self, logits: np.ndarray, history: list[int], stream: np.random.Generator) -> int:
        logits = penalize_repetition(logits, history, self.options.repetition_penalty)
        if self.options.greedy:
            return int(logits.argmax())
        return draw(filter_logits(logits, self.options), stream)


def penalize_repetition(logits: np.ndarray, history: list[int], penalty: float) -> np.ndarray:
    """``RepetitionPenaltyLogitsProcessor`` on ``logits [vocab]``."""
    if penalty == 1:
        return logits
    seen = np.unique(np.asarray(history, np.int64))
    penalized = logits.copy()
    penalized[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    return penalized


def filter_logits(logits: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """Temperature, top-k and top-p on ``logits [vocab]``; -inf where a token is ruled out. ``temperature`` is not 0 here."""
    if options.temperature is not None:
        logits = logits / np.float32(options.temperature)
        logits = logits - logits.max()  # a tiny temperature must not overflow; no probability changes
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None:
        logits = keep_top_p(logits, options.top_p)
    return logits


def keep_top_k(logits: np.ndarray, top_k: int) -> np.ndarray:
    """``TopKLogitsWarper``: tokens that tie with the k-th stay."""
    if top_k == 0 or top_k >= len(logits):
        return logits
    return np.where(logits < np.partition(logits, -top_k)[-top_k], -np.inf, logits)


def keep_top_p(logits: np.ndarray, top_p: float) -> np.ndarray:
    """``TopPLogitsWarper``: from the least likely up, tokens go while their sum is at most ``1 - top_p``; one always stays."""
    if top_p == 1:
        return logits
    order = np.argsort(logits, kind="stable")
    unlikely = np.cumsum(softmax(logits[order])) <= 1 - top_p
    unlikely[-1] = False
    kept = logits.copy()
    kept[order[unlikely]] = -np.inf
    return kept


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64 probabilities of ``logits [n]``."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def draw(logits: np.ndarray, stream: np.random.Generator) -> int:
    """One token id from ``logits [vocab]``, by inverting the cumulative distribution at one uniform number."""
    tokens = np.flatnonzero(logits > -np.inf)
    cumulative = np.cumsum(softmax(logits[tokens]))
    index = np.searchsorted(cumulative, stream.random() * cumulative[-1], side="right")
    return int(tokens[min(index, len(tokens) - 1)])
