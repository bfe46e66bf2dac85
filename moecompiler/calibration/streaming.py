"""Calibration of a whole model, layer by layer: the hidden states of all samples go through one layer, then through the next.

Only that layer's weights are read, its experts' one after another; so a model that is larger than memory can be calibrated, and
every weight is read once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moecompiler.calibration.layers import AttentionMagnitudes, ExpertMagnitudes, Place, run_attention, run_expert
from moecompiler.calibration.result import Calibration, ExpertTokens
from moecompiler.calibration.states import MEMORY_LIMIT, HiddenStates
from moecompiler.calibration.statistics import Magnitudes
from moecompiler.calibration.workers import MOST_THREADS, workers
from moecompiler.checkpoint import Source
from moecompiler.config import ModelConfig, NormalizationMode

ATTENTION_MEMORY = 4 << 30  # bytes that attention's scores may take on all threads together
EMBEDDING_ROWS = 4096  # that are in memory at a time
STARVED_SHARE, STARVED_TOKENS = 0.1, 256

Progress = Callable[[int, int], None]  # experts done, of how many


@dataclass(frozen=True)
class Settings:
    """``dtype``: what weights are rounded to before they are widened to float32. ``min_tokens``: an expert that gets fewer is fed
    all tokens (default: a tenth of an equal share, at most 256). ``threads``: default, as many as cores; the result is the same.
    ``memory_limit``: bytes of hidden states that are kept in memory."""

    dtype: str
    mode: NormalizationMode = NormalizationMode.RENORMALIZE
    device: str = "cpu"
    min_tokens: int | None = None
    threads: int | None = None
    memory_limit: int = MEMORY_LIMIT


def least_tokens(tokens: int, config: ModelConfig, min_tokens: int | None) -> int:
    """How many tokens an expert must get, of ``tokens``, not to be fed."""
    equal_share = tokens * config.num_experts_per_tok / config.num_local_experts
    least = min(int(equal_share * STARVED_SHARE), STARVED_TOKENS) if min_tokens is None else min_tokens
    return max(least, 1)  # statistics of no token at all are none


def calibrate(
    config: ModelConfig,
    source: Source,
    samples: Sequence[Sequence[int]],
    settings: Settings,
    folder: Path,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """Runs ``samples``, token ids of the model, through the checkpoint; ``folder`` is for hidden states that do not fit into
    memory.

    Raises: UserError where weights or hidden states are NaN or infinite, or there is no room on the disk.
    """
    lengths = [len(sample) for sample in samples]
    least = least_tokens(sum(lengths), config, settings.min_tokens)
    place = Place(config, source, settings.dtype, settings.mode, settings.device)
    found = _Found({}, {}, {}, {}, {})
    total = config.num_hidden_layers * config.num_local_experts
    with (
        HiddenStates(lengths, config.hidden_size, folder, settings.memory_limit) as states,
        workers(threads_for(settings, config, max(lengths))) as each,
    ):
        embed(place, samples, states)
        for layer in range(config.num_hidden_layers):
            attention, routing = run_attention(place, layer, states, each)
            found.attention(layer, attention)
            for expert in range(config.num_local_experts):
                found.expert(layer, expert, run_expert(place, layer, expert, states, routing, least, each))
                progress(layer * config.num_local_experts + expert + 1, total)
    calibration = Calibration(found.input_amax, found.input_mean, found.keys, found.values, found.experts)
    calibration.check_complete(config)
    return calibration


def threads_for(settings: Settings, config: ModelConfig, longest: int) -> int:
    if settings.device != "cpu":
        return 1
    scores = 4 * 4 * config.num_attention_heads * longest**2  # of one sample, in four stages
    fitting = max(1, ATTENTION_MEMORY // scores)
    return min(settings.threads or min(os.cpu_count() or 1, MOST_THREADS), fitting)


def embed(place: Place, samples: Sequence[Sequence[int]], states: HiddenStates) -> None:
    """Reads the embedding a block of rows at a time."""
    vocab, hidden = place.config.vocab_size, place.config.hidden_size
    ids = torch.tensor([token for sample in samples for token in sample])
    for first in range(0, vocab, EMBEDDING_ROWS):
        count = min(EMBEDDING_ROWS, vocab - first)
        (mine,) = ((ids >= first) & (ids < first + count)).nonzero(as_tuple=True)
        if len(mine):
            rows = place.rows("model.embed_tokens.weight", first, (count, hidden)).to("cpu")
            states.residual[mine] = rows[ids[mine] - first]


@dataclass(frozen=True)
class _Found:
    """What ``Calibration`` holds, as it grows."""

    input_amax: dict[str, float]
    input_mean: dict[str, np.ndarray]
    keys: dict[str, float]
    values: dict[str, float]
    experts: dict[str, ExpertTokens]

    def attention(self, layer: int, found: AttentionMagnitudes) -> None:
        name = f"model.layers.{layer}.self_attn"
        for part in "qkv":
            self._linear(f"{name}.{part}_proj", found.normed)
        self._linear(f"{name}.o_proj", found.merged)
        self.keys[name], self.values[name] = found.keys, found.values
        self._linear(f"model.layers.{layer}.block_sparse_moe.gate", found.routed)

    def expert(self, layer: int, expert: int, found: ExpertMagnitudes) -> None:
        name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        for weight, met in (("w1", found.outer), ("w3", found.outer), ("w2", found.inner)):
            self._linear(f"{name}.{weight}", met)
        self.experts[name] = ExpertTokens(found.tokens, found.fed)

    def _linear(self, name: str, met: Magnitudes) -> None:
        self.input_amax[name], self.input_mean[name] = met.amax, met.mean.numpy()
