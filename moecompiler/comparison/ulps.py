"""Errors in units in the last place of an output's type, and which of two errors is the larger one, with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moecompiler.comparison.result import Ulps

SMALL = 16
_RESAMPLES, _SEED, _LARGEST = 1000, 0, 4096
_CONFIDENCE = 95.0  # per cent


@dataclass(frozen=True)
class FloatType:
    """A binary floating-point type of IEEE 754's kind: bits of its significand, the leading one included, the exponent of its
    smallest normal number, and its largest number."""

    precision: int
    least_exponent: int
    largest: float


FLOAT_TYPES = {
    "float32": FloatType(24, -126, float(np.finfo(np.float32).max)),
    "float16": FloatType(11, -14, 65504.0),
    "bfloat16": FloatType(8, -126, float.fromhex("0x1.fep127")),
}


def unit(value: np.ndarray, dtype: str) -> np.ndarray:
    """The distance of neighbouring numbers of ``dtype`` at ``value``, float64; 1 of integers."""
    if dtype not in FLOAT_TYPES:
        return np.ones_like(value, dtype=np.float64)
    kind = FLOAT_TYPES[dtype]
    size = np.minimum(np.abs(value.astype(np.float64)), kind.largest)
    exponent = np.where(size > 0, np.maximum(np.frexp(size)[1] - 1, kind.least_exponent), kind.least_exponent)
    return np.ldexp(1.0, exponent - (kind.precision - 1))


def ulps(got: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
    """``|got - exact|`` in units in the last place of ``exact`` as a number of ``dtype``, float64 of the same shape.

    What is left where larger numbers cancel cannot be more exact than these: an element counts as no smaller than a ``SMALL``-th
    of its row's root mean square, a row being the last axis. An infinity is right where the exact number is out of the type's
    range, with the same sign; what is no number is infinitely wrong unless the exact number is none either.
    """
    exact, got = np.asarray(exact, np.float64), np.asarray(got).astype(np.float64)
    kind = FLOAT_TYPES.get(dtype)
    finite = np.where(np.isfinite(exact), exact, 0.0)
    largest = kind.largest if kind is not None else np.inf
    clipped = np.clip(finite, -largest, largest)
    # squares of numbers near float64's ends would leave it; a row's largest is taken out first
    peak = np.abs(clipped).max(-1, keepdims=True, initial=0.0)
    scaled = clipped / np.where(peak > 0, peak, 1.0)
    rms = peak * np.sqrt((scaled**2).mean(-1, keepdims=True)) if exact.ndim and exact.shape[-1] else peak
    yardstick = np.maximum(np.abs(clipped), rms / SMALL) if kind is not None else clipped
    with np.errstate(invalid="ignore"):
        error = np.abs(got - exact) / unit(yardstick, dtype)
    if kind is not None:
        beyond = np.abs(exact) > kind.largest
        error = np.where(beyond & np.isinf(got) & (np.sign(got) == np.sign(exact)), 0.0, error)
    error = np.where(np.isnan(got) & np.isnan(exact), 0.0, error)
    return np.where(np.isnan(error), np.inf, error)


def summary(errors: np.ndarray, got: np.ndarray, exact: np.ndarray) -> Ulps:
    """Of what ``ulps`` gives for the two; infinite where any is."""
    with np.errstate(invalid="ignore"):
        absolute = np.abs(np.asarray(got).astype(np.float64) - exact)
    absolute = np.where(errors == 0, 0.0, absolute)  # infinity less infinity
    largest = float(np.where(np.isnan(absolute), np.inf, absolute).max(initial=0.0))
    if not errors.size:
        return Ulps(0.0, 0.0, 0.0, 0.0)
    if not np.isfinite(errors).all():
        return Ulps(np.inf, np.inf, float(np.quantile(errors, 0.99, method="higher")), largest, np.inf)
    row = float(errors.mean(-1).max())
    return Ulps(float(errors.max()), float(errors.mean()), float(np.quantile(errors, 0.99)), largest, row)


def ratio_of_means(first: np.ndarray, second: np.ndarray) -> tuple[float | None, tuple[float, float] | None]:
    """The mean of ``first [rows, columns]`` over that of ``second``, and the interval that holds it with ``_CONFIDENCE``: the
    percentile bootstrap (Efron 1979) over rows, which are what is independent; over elements where there is one row. The same
    rows are drawn of both. None where both are 0 or one is not finite; deterministic."""
    if not first.size or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None, None
    if not first.any() and not second.any():
        return None, None
    if len(first) > 1:
        a, b = first.mean(-1), second.mean(-1)
    else:
        a, b = first.reshape(-1), second.reshape(-1)
    ratio = _over(float(a.mean()), float(b.mean()))
    rng = np.random.default_rng(_SEED)
    if len(a) > _LARGEST:
        chosen = rng.choice(len(a), _LARGEST, replace=False)
        a, b = a[chosen], b[chosen]
    drawn = rng.integers(0, len(a), (_RESAMPLES, len(a)))
    ratios = np.sort([_over(float(x), float(y)) for x, y in zip(a[drawn].mean(-1), b[drawn].mean(-1), strict=True)])
    tail = (100 - _CONFIDENCE) / 2
    low, high = (float(np.percentile(ratios, each, method="nearest")) for each in (tail, 100 - tail))
    return ratio, (low, high)


def _over(a: float, b: float) -> float:
    return a / b if b else (float("inf") if a else 1.0)
