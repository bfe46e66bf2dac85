"""Routing: the formulas of ``routing``'s docstring, written again in numpy, and transformers' own routers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moecompiler.config import SPARSE_MIXER_EPSILON, NormalizationMode
from moecompiler.routing import route

MODES = list(NormalizationMode)
EXPERTS = 5


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def weights_by_formula(z: np.ndarray, experts: list[int], mode: NormalizationMode) -> list[float]:
    """The weights of the chosen experts of one token, in float64."""
    if mode is NormalizationMode.NONE:
        return [softmax(z)[i] for i in experts]
    if mode is NormalizationMode.RENORMALIZE:
        return list(softmax(z[experts]))
    weights, free = [], list(range(len(z)))
    for i in experts:
        m = max(z[j] for j in free)
        near = []
        for j in free:
            scale = max(abs(z[j]), m)
            # 0 / 0, which no comparison with a number holds for: not far
            if scale == 0 or not (m - z[j]) / scale > 2 * 0.01:
                near.append(j)
        weights.append(math.exp(z[i] - m) / sum(math.exp(z[j] - m) for j in near))
        free.remove(i)
    return weights


def logits(kind: str) -> np.ndarray:
    """Rows of float32 logits."""
    rng = np.random.default_rng(5)
    normal = rng.standard_normal((200, EXPERTS))
    rows = {
        "random": normal,
        "wide": normal * 30,
        "large": normal * 1e4,
        "close": 10 + normal * 0.1,  # within SparseMixer's 2 ε or just not
        "negative": -abs(normal) - 3,
        "close and negative": -10 + normal * 0.1,
        "near zero": normal * 1e-6,
        "one stands out": np.eye(EXPERTS) * 50,
        "all equal": np.array([[c] * EXPERTS for c in (0.0, 1.0, -1.0, 1e4, -1e4)]),
        "ties": np.array([[1, 1, 0, 0, 0], [2, 5, 5, 5, 1], [-1, -1, -2, -2, -2], [0, 0, 0, 1, 1], [3, 2, 2, 2, 2]]),
    }
    return rows[kind].astype(np.float32)


KINDS = (
    *("random", "wide", "large", "close", "negative", "close and negative", "near zero"),
    *("one stands out", "all equal", "ties"),
)


@pytest.mark.parametrize("top_k", [1, 2, 3, EXPERTS])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind: str, mode: NormalizationMode, top_k: int) -> None:
    """The chosen are distinct and the largest, in falling order (which of equals is open), with the formula's weights.
    ``NONE`` chooses by what softmax leaves of the logits, where very small ones are all zero."""
    z = logits(kind)
    weights, experts = (t.numpy() for t in route(torch.from_numpy(z), top_k, mode))
    assert weights.dtype == np.float32
    assert experts.dtype == np.int64
    assert weights.shape == experts.shape == (len(z), top_k)
    for row, chosen, got in zip(z.astype(np.float64), experts.tolist(), weights, strict=True):
        assert len(set(chosen)) == top_k
        ranked, rtol = (softmax(row), 1e-6) if mode is NormalizationMode.NONE else (row, 0)
        np.testing.assert_allclose(ranked[chosen], np.sort(ranked)[::-1][:top_k], rtol, atol=1e-37)
        np.testing.assert_allclose(got, weights_by_formula(row, chosen, mode), rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_low_precision_logits_are_computed_in_float32(mode: NormalizationMode) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        z = torch.from_numpy(logits("random")).to(dtype)
        for got, wanted in zip(route(z, 2, mode), route(z.float(), 2, mode), strict=True):
            assert torch.equal(got, wanted)


def test_sums_of_weights() -> None:
    """What tells the modes apart: below 1, exactly 1, and anything up to k."""
    z = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]])
    sums = {mode: route(z, 2, mode)[0].sum().item() for mode in MODES}
    assert sums[NormalizationMode.NONE] == pytest.approx(softmax(z[0].numpy())[:2].sum(), rel=1e-6)
    assert sums[NormalizationMode.RENORMALIZE] == pytest.approx(1.0, rel=1e-6)
    assert sums[NormalizationMode.SPARSE_MIXER] == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_mixer_is_phimoes(kind: str) -> None:
    """``transformers``' own, as it is evaluated outside training."""
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    z = torch.from_numpy(logits(kind))
    weights, experts = phimoe.sparsemixer(z, jitter_eps=SPARSE_MIXER_EPSILON, training=False, top_k=2)
    got_weights, got_experts = route(z, 2, NormalizationMode.SPARSE_MIXER)
    assert torch.equal(got_experts, experts)
    torch.testing.assert_close(got_weights, weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_renormalize_is_mixtrals(top_k: int) -> None:
    """``MixtralTopKRouter``'s, up to rounding: it takes softmax before top-k and normalizes after."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    router = MixtralTopKRouter(MixtralConfig(num_local_experts=EXPERTS, num_experts_per_tok=top_k, hidden_size=EXPERTS))
    router.weight.data = torch.eye(EXPERTS)
    for kind in ("random", "close", "negative", "close and negative"):
        z = torch.from_numpy(logits(kind))
        with torch.no_grad():
            _, weights, experts = router(z)
        got_weights, got_experts = route(z, top_k, NormalizationMode.RENORMALIZE)
        assert torch.equal(got_experts, experts)
        torch.testing.assert_close(got_weights, weights, rtol=2e-6, atol=0)
