"""AWQ's search over a whole model, layer by layer, on what its layers get in the float model (see ``trial`` for the method).

Scales go where the operation before a product can take them in: into the first norm before queries, keys and values; into values'
rows before the output projection, where there are as many key-value heads as heads; into the second norm before the router,
which is not quantized, and all experts' w1 and w3; into w3's rows before w2, by expert.

In memory are the hidden states of all samples, a layer's attention or one expert, and at most ``kept.MOST`` tokens' activations.
Weights of attention are read twice, of experts three times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moecompiler.calibration.kept import MOST, KeptInputs, spread
from moecompiler.calibration.layers import Place, Routing, run_attention, run_expert
from moecompiler.calibration.states import HiddenStates
from moecompiler.calibration.streaming import Progress, Settings, embed, least_tokens, threads_for
from moecompiler.calibration.trial import GRID, clips, error, scales_of
from moecompiler.calibration.workers import Each, workers
from moecompiler.checkpoint import Source
from moecompiler.config import ModelConfig
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.schemes import Granularity, WeightScheme
from moecompiler.smoothed_checkpoint import Smoothing


@dataclass(frozen=True)
class _Search:
    """``scheme_of``: how a weight is quantized, for those that are integers in groups; None for the others."""

    place: Place
    scheme_of: Callable[[str], WeightScheme | None]
    each: Each
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    clips: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.place.dtype]

    def errors(self, x: torch.Tensor, mean: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of each exponent, float64 ``[GRID]``."""

        def of(step: int) -> float:
            with torch.inference_mode():
                scales = scales_of(mean, step)
                schemes = {name: self.scheme_of(name) for name in weights}
                return sum(
                    error(x, weights[name], scales, scheme, self.dtype) for name, scheme in schemes.items() if scheme
                )

        return torch.tensor(list(self.each(of, range(GRID))), dtype=torch.float64)

    def take(self, mean: torch.Tensor, errors: torch.Tensor, weights: Sequence[str]) -> torch.Tensor:
        """The best scales, noted as those of the columns of ``weights``."""
        scales = scales_of(mean, int(errors.argmin()))
        for name in weights:
            self.columns[f"{name}.weight"] = scales.cpu().numpy()
        return scales

    def absorb(self, name: str, scales: torch.Tensor) -> None:
        """Rows of what comes before are divided by them."""
        self.rows[f"{name}.weight"] = (1 / scales).cpu().numpy()

    def clip(self, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
        """``x`` and ``weights``: with what is noted of them."""

        def of(name: str) -> torch.Tensor | None:
            with torch.inference_mode():
                scheme = self.scheme_of(name)
                return None if scheme is None else clips(x, weights[name], scheme, self.dtype)

        for name, found in zip(weights, self.each(of, weights), strict=True):
            if found is not None:
                self.clips[f"{name}.weight"] = found.cpu().numpy()


def search(
    config: ModelConfig,
    source: Source,
    samples: Sequence[Sequence[int]],
    settings: Settings,
    plan: QuantizationRecipe,
    folder: Path,
    header: dict[str, Any],
    progress: Progress = lambda done, total: None,
) -> Smoothing:
    """On ``samples``, token ids of the model; ``plan``: which weights are quantized how. ``folder`` is for hidden states that do
    not fit into memory. What ``plan`` does not hold as integers in groups is left out, and counts as exact.

    Raises: UserError where weights or hidden states are NaN or infinite, or there is no room on the disk.
    """

    def scheme_of(name: str) -> WeightScheme | None:
        scheme = plan.scheme_of(name)
        grouped = scheme is not None and scheme.granularity is Granularity.BLOCK and not scheme.two_level
        return scheme if grouped else None

    lengths = [len(sample) for sample in samples]
    least = least_tokens(sum(lengths), config, settings.min_tokens)
    place = Place(config, source, settings.dtype, settings.mode, settings.device)
    with (
        HiddenStates(lengths, config.hidden_size, folder, settings.memory_limit) as states,
        workers(threads_for(settings, config, max(lengths))) as each,
    ):
        embed(place, samples, states)
        found = _Search(place, scheme_of, each)
        experts = config.num_local_experts
        total = 3 * experts * config.num_hidden_layers
        for layer in range(config.num_hidden_layers):
            kept = KeptInputs(sum(lengths), config.hidden_size, config.num_attention_heads * config.head_dim)
            magnitudes, routing = run_attention(place, layer, states, each, kept)
            _attention(found, layer, kept, magnitudes.normed.mean, magnitudes.merged.mean)
            done = 3 * experts * layer
            scales = _experts_scales(found, layer, states, routing, magnitudes.routed.mean, least)
            progress(done + experts, total)
            for expert in range(experts):
                _expert(found, layer, expert, states, routing, scales, least)
                run_expert(place, layer, expert, states, routing, least, each)
                progress(done + experts + 2 * (expert + 1), total)
    sizes = {name: scheme.block_size for name in found.clips if (scheme := scheme_of(name.removesuffix(".weight")))}
    return Smoothing(found.rows, found.columns, found.clips, header | {"group_sizes": sizes})


@torch.inference_mode()
def _attention(found: _Search, layer: int, kept: KeptInputs, normed: torch.Tensor, merged: torch.Tensor) -> None:
    """``normed``, ``merged``: mean magnitudes of the two inputs."""
    config, device = found.place.config, found.place.device
    prefix, size = f"model.layers.{layer}", config.hidden_size
    rows = {"q": config.num_attention_heads * config.head_dim, "k": config.num_key_value_heads * config.head_dim}
    rows["v"] = rows["k"]
    names = [f"{prefix}.self_attn.{part}_proj" for part in rows]
    weights = {
        name: found.place.weight(f"{name}.weight", (count, size))
        for name, count in zip(names, rows.values(), strict=True)
    }
    x, mean = kept.normed.to(device), normed.to(device)
    scales = found.take(mean, found.errors(x, mean, weights), names)
    found.absorb(f"{prefix}.input_layernorm", scales)
    values, output = f"{prefix}.self_attn.v_proj", f"{prefix}.self_attn.o_proj"
    # queries and keys are not clipped, as in AutoAWQ: their product is what matters
    found.clip(x / scales, {values: weights[values] * scales})
    weight = {output: found.place.weight(f"{output}.weight", (size, rows["q"]))}
    x, mean = kept.merged.to(device), merged.to(device)
    if rows["q"] == rows["v"]:
        scales = found.take(mean, found.errors(x, mean, weight), [output])
        found.absorb(values, scales)
        x, weight = x / scales, {output: weight[output] * scales}
    found.clip(x, weight)


@torch.inference_mode()
def _experts_scales(
    found: _Search, layer: int, states: HiddenStates, routing: Routing, mean: torch.Tensor, least: int
) -> torch.Tensor:
    """Those of the second norm: best for all experts together, each with the tokens that it gets."""
    place, prefix = found.place, f"model.layers.{layer}"
    inner, hidden = place.config.intermediate_size, place.config.hidden_size
    mean, errors = mean.to(place.device), torch.zeros(GRID, dtype=torch.float64)
    names = []
    for expert in range(place.config.num_local_experts):
        both = [f"{prefix}.block_sparse_moe.experts.{expert}.{each}" for each in ("w1", "w3")]
        weights = {name: place.weight(f"{name}.weight", (inner, hidden)) for name in both}
        tokens, represented = _tokens_of(routing, expert, least)
        errors += found.errors(states.normed[tokens].to(place.device), mean, weights) * represented / len(tokens)
        names += both
    scales = found.take(mean, errors, [*names, f"{prefix}.block_sparse_moe.gate"])
    found.absorb(f"{prefix}.post_attention_layernorm", scales)
    return scales


@torch.inference_mode()
def _expert(
    found: _Search, layer: int, expert: int, states: HiddenStates, routing: Routing, scales: torch.Tensor, least: int
) -> None:
    place, prefix = found.place, f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    inner, hidden = place.config.intermediate_size, place.config.hidden_size
    w1, w3, w2 = (f"{prefix}.{each}" for each in ("w1", "w3", "w2"))
    outer = {name: place.weight(f"{name}.weight", (inner, hidden)) for name in (w1, w3)}
    down = place.weight(f"{w2}.weight", (hidden, inner))
    x = states.normed[_tokens_of(routing, expert, least)[0]].to(place.device)
    between = F.silu(F.linear(x, outer[w1])) * F.linear(x, outer[w3])
    mean = between.abs().mean(0)
    inner_scales = found.take(mean, found.errors(between, mean, {w2: down}), [w2])
    found.absorb(w3, inner_scales)
    found.clip(x / scales, {w1: outer[w1] * scales, w3: outer[w3] * scales / inner_scales[:, None]})
    found.clip(between / inner_scales, {w2: down * inner_scales})


def _tokens_of(routing: Routing, expert: int, least: int) -> tuple[torch.Tensor, int]:
    """Some of the tokens that an expert gets, and how many those stand for; where it gets too few, those that it is likeliest to
    get."""
    tokens = (routing.experts == expert).any(-1).nonzero()[:, 0]
    if len(tokens) >= least:
        return tokens[spread(len(tokens))], len(tokens)
    count = min(len(routing.logits), MOST)
    likeliest = torch.log_softmax(routing.logits, dim=-1)[:, expert].topk(count).indices
    return likeliest, max(len(tokens), 1)
