"""The one place that says how far an engine may be from PyTorch.

The reference computes in float32 with the engine's own weights (rounded to its dtype), so what is bounded is the error of the
engine's arithmetic. Bounds are by the dtype that arithmetic is in, which a backend may widen (``Backend.compute_dtype``).
docs/validation.md has what was measured when they were set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Tolerance:
    """``atol`` and ``rtol`` bound each element of an output, ``|a - b| <= atol + rtol * |b|``; ``norm`` bounds
    ``‖a - b‖ / ‖b‖`` of one layer's part fed with the reference's values; ``logits`` the largest error of a logit, ``kl`` the
    mean Kullback-Leibler divergence (nats a token) from HF's distribution, and ``top1`` the share of tokens whose most
    likely successor is HF's."""

    atol: float
    rtol: float
    norm: float
    logits: float
    kl: float
    top1: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


TOLERANCES = {
    "float32": Tolerance(atol=2e-4, rtol=1e-3, norm=1e-4, logits=2e-4, kl=1e-6, top1=0.999),
    "float16": Tolerance(atol=3e-2, rtol=2e-2, norm=5e-3, logits=0.25, kl=1e-4, top1=0.98),
    "bfloat16": Tolerance(atol=0.4, rtol=0.2, norm=5e-2, logits=2.0, kl=2e-2, top1=0.9),
}
