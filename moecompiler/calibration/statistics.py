"""Largest magnitudes and mean magnitudes of activations, gathered part by part.

A maximum is exact, and sums are made in float64 over parts of fixed size that are added in a fixed order: results do not depend
on how many threads worked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """Of the activations ``[tokens, channels]`` that meet a weight: the largest ``amax``; by channel the weighted sum of
    magnitudes, ``sums [channels]`` float64; the sum of the tokens' weights, and how many tokens there were."""

    amax: float
    sums: torch.Tensor
    weight: float
    tokens: int

    @staticmethod
    def of(x: torch.Tensor, weights: torch.Tensor | None = None) -> Magnitudes:
        """``x [tokens, channels]`` float32, at least one token; ``weights [tokens]`` float64 (default: 1 each) are for the sums
        alone."""
        magnitudes = x.abs()
        amax = float(magnitudes.amax())
        if weights is None:
            return Magnitudes(amax, magnitudes.sum(0, dtype=torch.float64).cpu(), float(len(x)), len(x))
        return Magnitudes(amax, (weights @ magnitudes.double()).cpu(), float(weights.sum()), len(x))

    def __add__(self, other: Magnitudes) -> Magnitudes:
        return Magnitudes(
            max(self.amax, other.amax),
            self.sums + other.sums,
            self.weight + other.weight,
            self.tokens + other.tokens,
        )

    @property
    def mean(self) -> torch.Tensor:
        """The mean magnitude by channel, ``[channels]`` float32."""
        return (self.sums / self.weight).float()
