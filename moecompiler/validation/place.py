"""Which rank of which model, and the arrays that go in and out of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moecompiler.config import ExportOptions, ModelConfig
from moecompiler.mapping import Mapping
from moecompiler.quantization.recipe import QuantizationRecipe

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class RankPlace:
    """Which rank of which model split how, quantized how; a rank's torch module depends on no more."""

    config: ModelConfig
    mapping: Mapping
    options: ExportOptions
    rank: int
    quantization: QuantizationRecipe | None = None

    @property
    def layers(self) -> range:
        return self.mapping.layers(self.rank, self.config.num_hidden_layers)

    @property
    def main_input(self) -> str:
        return "input_ids" if self.mapping.is_first_stage(self.rank) else "hidden_states"

    @property
    def main_output(self) -> str:
        return "logits" if self.mapping.is_last_stage(self.rank) else "next_hidden_states"
