"""The one place that says how far an engine may be from PyTorch.

The reference computes in float32 with the engine's own weights (rounded to its dtype), so what is bounded is the error of the
engine's arithmetic. Bounds are by the dtype that arithmetic is in, which a backend may widen (``Backend.compute_dtype``).
docs/validation.md has what was measured when they were set.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

import numpy as np

from moecompiler.quantization.schemes import Format


@dataclass(frozen=True)
class Tolerance:
    """``atol`` and ``rtol`` bound an output's elements, ``|a - b| <= atol + rtol * |b|``; ``norm`` bounds a token's
    ``‖a - b‖ / ‖b‖`` in one layer's part fed with the reference's values; ``logits`` a token's largest error of a logit;
    ``kl`` the mean Kullback-Leibler divergence (nats a token) from HF's distribution; ``top1`` is the least share of tokens
    whose most likely successor is HF's, or is one of ``ties`` tokens at most whose two most likely ones the bounds cannot tell
    apart (``tied``): of few tokens one alone is more than the share that may differ.

    ``outliers`` is the share of tokens (of elements, for outputs) that may be beyond these bounds: where two experts score
    alike, a narrow type's rounding decides otherwise than float32's, and that token's values are others from there on. A
    wrong expert touches every token that is routed to it, which is far more.

    Of few tokens one alone is a larger share. ``tie`` is the margin of a router (``ties.router_margin``) up to which rounding
    may decide, 0 where it is not to: several times the type's epsilon, since what is rounded before the router adds up.
    ``rerouted`` is the share of an output's tokens that may be out of bounds when the reference saw them at such a tie.
    """

    atol: float
    rtol: float
    norm: float
    logits: float
    kl: float
    top1: float
    outliers: float = 0.0
    tie: float = 0.0
    rerouted: float = 0.0
    ties: int = 3

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @property
    def tied(self) -> float:
        """The gap of two logits up to which either may come out as the larger: each may be off by ``atol``."""
        return 2 * self.atol

    def worst(self, errors: np.ndarray) -> float:
        """The largest of the errors, but for the outliers; infinite where an error is no number."""
        errors = np.where(np.isfinite(errors), errors, np.inf).reshape(-1)
        return float(np.quantile(errors, 1 - self.outliers, method="higher"))


TOLERANCES = {
    "float32": Tolerance(atol=2e-4, rtol=1e-3, norm=1e-4, logits=2e-4, kl=1e-6, top1=0.999),
    "float16": Tolerance(
        atol=3e-2, rtol=2e-2, norm=1e-2, logits=0.25, kl=1e-3, top1=0.98, outliers=0.05, tie=4 * 2**-10, rerouted=0.1
    ),
    "bfloat16": Tolerance(
        atol=0.4, rtol=0.2, norm=1e-1, logits=2.0, kl=2e-2, top1=0.9, outliers=0.1, tie=4 * 2**-7, rerouted=0.2
    ),
}

# FP8 inputs of weights: where two arithmetics end on different sides of the middle between two codes, one element is off by a
# sixteenth, and all that comes after it by a percent. In float32 that is rare; in narrower types it is on every token
_FP8_INPUTS = Tolerance(
    atol=2e-2, rtol=1e-2, norm=1e-2, logits=0.5, kl=2e-3, top1=0.97, outliers=0.1, tie=4 * 2**-7, rerouted=0.1
)

# format of weights → bounds of kl and top1, on top of those of the arithmetic; several times what was measured
# (docs/quantization.md)
_QUANTIZED = {
    Format.INT8: (5e-3, 0.97),
    Format.INT4: (0.2, 0.8),
    Format.UINT4: (0.2, 0.8),
    Format.E4M3: (3e-2, 0.92),
    Format.E2M1: (0.2, 0.8),
}
_FEW = 100


def for_formats(tolerance: Tolerance, formats: Collection[Format], *, cache: bool = False) -> Tolerance:
    """The bounds of engines with weights in these formats, against PyTorch with what these stand for, where ``tolerance`` is that
    of their arithmetic: FP8 weights get rounded inputs, and a ``cache`` of codes rounded keys and values."""
    if Format.E4M3 not in formats and not cache:
        return tolerance
    return _FP8_INPUTS if tolerance == TOLERANCES["float32"] else TOLERANCES["bfloat16"]


def against_float(tolerance: Tolerance, formats: Collection[Format], tokens: int) -> Tolerance:
    """How far a model with weights in these formats (none: not quantized) may be from the one with its own weights, over
    ``tokens`` predictions. A token that gets another expert has other logits altogether: none is bounded by itself, nor are
    a few."""
    if not formats:
        return tolerance
    if tokens < _FEW:
        return replace(tolerance, logits=float("inf"), kl=float("inf"), top1=0.0)
    kl = tolerance.kl + max(_QUANTIZED[each][0] for each in formats)
    top1 = tolerance.top1 - max(1 - _QUANTIZED[each][1] for each in formats)
    return replace(tolerance, logits=float("inf"), kl=kl, top1=top1)
