"""How far logits are from a reference's: errors, likely tokens, distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moecompiler.validation.tolerances import Tolerance


@dataclass(frozen=True)
class Difference:
    """The largest error of an element, ``‖a - b‖ / ‖b‖``, the share of tokens with the same largest logit, the mean KL
    divergence from the reference's distribution (nats a token), and whether that is within tolerance. ``ties`` of the tokens
    whose largest logit is another one do not count against it (``at_tie``)."""

    max_abs: float
    relative: float
    top1: float
    kl: float
    passed: bool
    ties: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def logits_differ(logits: np.ndarray, reference: np.ndarray, tolerance: Tolerance) -> Difference:
    """Compares ``[..., vocab]`` with ``[..., vocab]``; NaN and infinities are out of any tolerance."""
    ours, theirs = log_softmax(logits), log_softmax(reference)
    finite = bool(np.isfinite(logits).all())
    error = np.abs(logits.astype(np.float64) - reference)
    max_abs = float(error.max()) if finite else float("inf")
    norm = float(np.linalg.norm(reference.astype(np.float64)))
    relative = float(np.linalg.norm(error)) / max(norm, np.finfo(np.float64).tiny) if finite else float("inf")
    kl = float(kl_divergence(theirs, ours).mean()) if finite else float("inf")
    agree = logits.argmax(-1) == reference.argmax(-1)
    ties = min(int(at_tie(logits, reference, tolerance.tied).sum()), tolerance.ties)
    likely = (int(agree.sum()) + ties) / agree.size >= tolerance.top1
    passed = tolerance.worst(error.max(-1)) <= tolerance.logits and kl <= tolerance.kl and likely
    return Difference(max_abs, relative, float(agree.mean()), kl, passed, ties)


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of ``other`` from ``reference``, in nats: log-probabilities ``[..., vocab]`` to ``[...]``."""
    return (np.exp(reference) * (reference - other)).sum(-1)


def at_tie(logits: np.ndarray, reference: np.ndarray, gap: float) -> np.ndarray:
    """For which tokens the largest of ``logits [..., vocab]`` is not the reference's largest, but one that the reference has at
    most ``gap`` below it: bool ``[...]``. How far off the logits are does not matter, so that an error excuses nothing."""
    chosen = np.take_along_axis(reference, logits.argmax(-1)[..., None], axis=-1)[..., 0]
    below = reference.max(-1).astype(np.float64) - chosen
    return (logits.argmax(-1) != reference.argmax(-1)) & (below <= gap)


def outputs_differ(
    outputs: Sequence[np.ndarray], reference: Sequence[np.ndarray], tolerance: Tolerance | Sequence[Tolerance]
) -> Difference:
    """The worst of each figure over several arrays of logits, each with a tolerance of its own or all with one."""
    tolerances = [tolerance] * len(outputs) if isinstance(tolerance, Tolerance) else tolerance
    found = [logits_differ(a, b, each) for a, b, each in zip(outputs, reference, tolerances, strict=True)]
    return Difference(
        max(each.max_abs for each in found),
        max(each.relative for each in found),
        min(each.top1 for each in found),
        max(each.kl for each in found),
        all(each.passed for each in found),
        sum(each.ties for each in found),
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """``‖value - reference‖ / ‖reference‖``; infinite where a value is not finite."""
    if not np.isfinite(value).all():
        return float("inf")
    norm = float(np.linalg.norm(reference.astype(np.float64)))
    error = float(np.linalg.norm(value.astype(np.float64) - reference.astype(np.float64)))
    return error / norm if norm else error


def relative_errors(value: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """``‖value - reference‖ / ‖reference‖`` over the last axis, one number a token ``[tokens]``. A token's reference counts as
    no smaller than a hundredth of the mean one: a rank whose experts a token hardly touches adds next to nothing to it."""
    wide, true = (array.astype(np.float64).reshape(-1, array.shape[-1]) for array in (value, reference))
    norms = np.linalg.norm(true, axis=-1)
    floor = max(1e-2 * float(norms.mean()), float(np.finfo(np.float32).tiny))
    return np.linalg.norm(wide - true, axis=-1) / np.maximum(norms, floor)
