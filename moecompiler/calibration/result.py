"""What calibration found, and the scales that follow from it.

Statistics go by the names that published checkpoints give to linear layers, without ``.weight``
(``model.layers.0.block_sparse_moe.experts.3.w1``), and are of what such a layer gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np

from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.quantization.encodings import E4M3_MAX
from moecompiler.quantization.published import LISTED, linear_stacks
from moecompiler.quantization.scales import positive


@dataclass(frozen=True)
class ExpertTokens:
    """``tokens`` that the router gave an expert; ``fed``: too few, so its statistics are those of all tokens."""

    tokens: int
    fed: bool


@dataclass(frozen=True, eq=False)
class Calibration:
    """``input_amax``: the largest magnitude, by linear layer, routers (``….block_sparse_moe.gate``) too. ``input_mean``: the mean
    magnitude of each input feature, float32 ``[in]``; empty where only scales are known. ``keys`` (after rotary embedding) and
    ``values``: the largest magnitudes by attention (``model.layers.0.self_attn``); empty where unknown. ``experts``: by
    ``model.layers.0.block_sparse_moe.experts.3``; empty where unknown. ``header``: what it was made of and how, JSON-able.
    ``where``: the file it was read from, for messages."""

    input_amax: Mapping[str, float]
    input_mean: Mapping[str, np.ndarray] = field(default_factory=dict)
    keys: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    experts: Mapping[str, ExpertTokens] = field(default_factory=dict)
    header: Mapping[str, Any] = field(default_factory=dict)
    where: str = "the calibration"

    def input_scale(self, linear: str, largest: float = E4M3_MAX) -> float:
        """The static scale of a linear layer's input: amax / ``largest`` (E4M3's 448) in float32; 1 where all was 0.

        Raises: UserError where there are no statistics of it.
        """
        return self._scale(self.input_amax, linear, largest)

    def cache_scales(self, attention: str, largest: float = E4M3_MAX) -> tuple[float, float]:
        """The static scales of an attention's cached keys and values; ``largest`` is 127 for int8.

        Raises: UserError where there are no statistics of them.
        """
        return self._scale(self.keys, attention, largest), self._scale(self.values, attention, largest)

    def channel_means(self, linear: str) -> np.ndarray:
        """The mean magnitude of each input feature of a linear layer, float32 ``[in]``.

        Raises: UserError where there are no such statistics.
        """
        if linear not in self.input_mean:
            raise UserError(
                f"{self.where}: has no means by channel of {linear}'s input; calibrate with `moecompiler calibrate`"
            )
        return self.input_mean[linear]

    def _scale(self, amaxes: Mapping[str, float], name: str, largest: float) -> float:
        if name not in amaxes:
            raise UserError(
                f"{self.where}: has no statistics of {name}; calibrate the model with `moecompiler calibrate`"
            )
        # a float64 quotient rounded to float32 is the float32 quotient; and a scale that was read comes out as it was
        return float(positive(np.array(amaxes[name] / largest, np.float32), "float32"))

    def check_complete(self, config: ModelConfig) -> None:
        """Raises UserError that names what is missing: a linear layer of the model, an expert above all, without statistics, or
        with such as no activations have."""
        names = [name for stack in linear_stacks(config) for name in stack]
        missing = [name for name in names if name not in self.input_amax]
        if missing:
            what = "experts without statistics" if "experts" in missing[0] else "without statistics"
            raise UserError(
                f"{self.where}: {what} ({len(missing)} of {len(names)} linear layers): {_listed(missing)};"
                " a scale cannot be guessed, calibrate on more text"
            )
        for amaxes in (self.input_amax, self.keys, self.values):
            wrong = [name for name, amax in amaxes.items() if not isfinite(amax) or amax < 0]
            if wrong:
                raise UserError(
                    f"{self.where}: largest magnitudes that are negative, NaN or infinite ({len(wrong)}): {_listed(wrong)}"
                )

    def check_model(self, fingerprint: str) -> None:
        """Raises UserError where this was made of another model than that of ``fingerprint`` (``identity.model_fingerprint``).
        What other tools published says nothing of that."""
        if self.header.get("model_fingerprint", fingerprint) != fingerprint:
            raise UserError(
                f"{self.where}: is the calibration of another model; calibrate this one into another --output_dir"
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
