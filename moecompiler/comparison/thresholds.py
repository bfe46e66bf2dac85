"""The one place that says what a comparison lets pass.

What is said of an engine against PyTorch is ``validation.tolerances``, by dtype and format; here is what is said of one program
against another. docs/comparison.md has what was measured when these were set.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moecompiler.comparison.result import Ulps
from moecompiler.quantization.schemes import Format
from moecompiler.validation.tolerances import TOLERANCES, against_float, for_formats

RATIO = 1.1
"""Of mean errors, up to which the first program is not further from the truth: the lower end of the ratio's interval is held
to it."""

ROUNDED = 0.5
"""Units in the last place: a mean error up to this one is rounding's, of which a quarter of a unit is the least there can be."""

ROW_TIMES = 4.0
"""The mean error of the first program's worst row (a token's, or a head's) may be so many times the second's, which counts as
at least ``ROUNDED``: a row has many elements, so its mean does not vary much."""

WORST_TIMES = 8.0
"""The first program's largest error may be so many times the second's, which counts as at least one unit."""


@dataclass(frozen=True)
class Held:
    """A number of a node's output that is held against a bound."""

    name: str
    value: float
    bound: float
    passed: bool


CODES_TIMES = 4.0
"""How many times as much a row and an element may be off in ops that round to codes: a number that ends on the other side of
the middle between two codes is off by a step, which is many units, and chance has it happen to one program or the other."""


def rounds_to_codes(op: str) -> bool:
    """Whether an op rounds activations to codes: FP8 weights' inputs, and keys and values of a cache of codes."""
    return "Fp8" in op or op.endswith("Cache")


def held(op: str, first: Ulps, second: Ulps, interval: tuple[float, float] | None) -> tuple[Held, ...]:
    """What decides whether a node's output is further from the truth in the first program than in the second."""
    if first.max == float("inf"):
        return (Held("largest error (ULP)", first.max, second.max, second.max == float("inf")),)
    if second.max == float("inf"):
        return (Held("largest error (ULP)", first.max, second.max, True),)
    low = interval[0] if interval is not None else 1.0
    times = CODES_TIMES if rounds_to_codes(op) else 1.0
    row, worst = times * ROW_TIMES * max(second.row, ROUNDED), times * WORST_TIMES * max(second.max, 1.0)
    return (
        Held("ratio of mean errors", low, RATIO, low <= RATIO or first.mean <= ROUNDED),
        Held("mean error of the worst row (ULP)", first.row, row, first.row <= row),
        Held("largest error (ULP)", first.max, worst, first.max <= worst),
    )


BESIDE = 2.0
"""A layer's error in the first program may be so many times that in the second."""

BETWEEN_TIMES = 2.0
"""The programs may be so many times as far from each other as each may be from the reference: both err on their own."""


@dataclass(frozen=True)
class Bounds:
    """``hidden``: relative error of hidden states, prefill or a stretch of decode, at the worst place; ``replayed_hidden``:
    the same with routing replayed; ``beside``: over the other program's; ``kl``: nats a token from the reference, ``top1``
    the least agreement, ``perplexity`` the relative increase; ``between``: nats a token of one program from the other;
    ``tie``: the margin in logits where greedy texts may part; ``rerouted`` and ``beyond_ties``: shares of (layer, token);
    ``margin``: the relative margin of a router that rounding may decide."""

    hidden: float
    replayed_hidden: float
    beside: float
    kl: float
    top1: float
    perplexity: float
    between: float
    tie: float
    rerouted: float
    beyond_ties: float
    margin: float


_HIDDEN = {"float32": 1e-3, "float16": 0.15, "bfloat16": 0.5}
_REPLAYED = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 0.15}
_PERPLEXITY = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
_BEYOND_TIES = 0.05  # a token that another expert computed in one layer is another token in the next ones


def bounds_for(
    dtype: str, formats: Collection[Format] = (), *, cache: bool = False, tokens: int = 0, against_floats: bool = False
) -> Bounds:
    """Of programs of ``dtype`` whose weights, or caches, are in these formats. ``against_floats``: the reference holds the
    checkpoint's own weights, not the numbers that codes stand for; over ``tokens`` predictions. What then cannot be bounded
    is infinite."""
    tolerance = for_formats(TOLERANCES[dtype], formats, cache=cache)
    kind = next((name for name, each in TOLERANCES.items() if each == tolerance), "bfloat16")
    found = against_float(tolerance, formats, tokens) if against_floats else tolerance
    free = against_floats and bool(formats)

    def bound(value: float) -> float:
        return float("inf") if free else value

    return Bounds(
        bound(_HIDDEN[kind]),
        bound(_REPLAYED[kind]),
        bound(BESIDE),
        found.kl,
        found.top1,
        _PERPLEXITY[kind] + (found.kl if free else 0.0),
        BETWEEN_TIMES * found.kl,
        bound(found.tied),
        bound(max(tolerance.rerouted, 1e-3)),
        bound(_BEYOND_TIES),
        tolerance.tie,
    )
