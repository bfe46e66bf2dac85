"""Tokens between two experts: where a router's logits are as good as equal, rounding decides which expert a token gets.

The reference says how close each decision was: the gap between the last expert that is chosen and the first that is not. A
token whose gap is larger than rounding cannot have been routed otherwise by rounding, and is held to the bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moecompiler.validation.scenario import Scenario
from moecompiler.validation.tolerances import Tolerance


def router_margin(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """How close the choice of experts is: logits ``[tokens, experts]`` → ``(z_k - z_{k+1}) / max|z|``, float32 ``[tokens]``, of
    the logits in falling order; infinite where every expert is chosen, 0 where all logits are 0. All normalization modes
    choose by this order."""
    logits = logits.float()
    if top_k == logits.shape[-1]:
        return torch.full(logits.shape[:-1], torch.inf)
    ordered = torch.topk(logits, top_k + 1, dim=-1).values
    largest = logits.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (ordered[..., -2] - ordered[..., -1]) / largest


@contextmanager
def watched_routers(module: nn.Module) -> Iterator[list[np.ndarray]]:
    """Collects, while ``module`` runs, the margins ``[tokens]`` of each of its routers, in the order they run."""
    margins: list[np.ndarray] = []

    def note(router: Any, inputs: Any, _output: Any) -> None:
        margins.append(router_margin(F.linear(inputs[0], router.weight), router.top_k).numpy())

    handles = [part.register_forward_hook(note) for name, part in module.named_modules() if name.endswith(".mlp.gate")]
    try:
        yield margins
    finally:
        for handle in handles:
            handle.remove()


def without_ties(scenario: Scenario, margins: np.ndarray) -> Scenario:
    """The scenario with those of its rows and spare rows that are farthest from a tie: ``margins [rows + spare rows, length]``
    are each token's smallest. The longest row chooses first. Deterministic, and which rank computed it makes no difference."""
    tokens = scenario.candidates()
    left, chosen = list(range(len(tokens))), []
    for length in scenario.prompt_lengths:
        smallest = margins[left, : length + scenario.decode_steps].min(axis=1)
        chosen.append(left.pop(int(smallest.argmax())))
    return replace(scenario, tokens=tokens[chosen], spare=None)


def output_margins(margins: np.ndarray, last_token_ids: np.ndarray | None) -> np.ndarray:
    """The smallest margin that a token's output depends on in one step: its own, or that of an earlier token of the same
    sequence, which it attends to. ``margins [B, S]`` → ``[B]`` of each row's ``last_token_ids``, or ``[B, S]`` of all."""
    smallest = np.minimum.accumulate(margins, axis=1)
    if last_token_ids is not None:
        smallest = np.take_along_axis(smallest, last_token_ids[:, None], axis=1)[:, 0]
    return smallest


def routed_otherwise(
    values: Sequence[np.ndarray], references: Sequence[np.ndarray], margins: Sequence[np.ndarray], tolerance: Tolerance
) -> list[np.ndarray]:
    """Which tokens are out of bounds and at a tie, one mask ``[...]`` for each step's ``[..., features]`` and margins ``[...]``;
    none at all where they are more than the share that the tolerance allows (of all steps' tokens, one in any case). A value
    that is no number is not of another expert."""
    masks = []
    for value, reference, margin in zip(values, references, margins, strict=True):
        # subtracting infinities warns; those tokens are not counted
        with np.errstate(invalid="ignore"):
            error = np.abs(value.astype(np.float64) - reference)
        finite = np.isfinite(value).all(-1)
        within = (error <= tolerance.atol).mean(-1) >= 1 - tolerance.outliers
        masks.append(finite & ~within & (margin <= tolerance.tie))
    tokens = sum(mask.size for mask in masks)
    allowed = max(1, int(tolerance.rerouted * tokens))
    return masks if sum(int(mask.sum()) for mask in masks) <= allowed else [np.zeros_like(mask) for mask in masks]
