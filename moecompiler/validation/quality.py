"""The ranks recombined, against Hugging Face's model: logits, likely tokens, distributions, perplexity."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moecompiler.checkpoint import Source, expected_tensors
from moecompiler.config import ModelConfig
from moecompiler.reference import to_torch
from moecompiler.validation.difference import log_softmax, logits_differ
from moecompiler.validation.scenario import Scenario
from moecompiler.validation.tolerances import Tolerance


@dataclass(frozen=True)
class Quality:
    """Over ``tokens`` predictions: the largest error of a logit, the mean KL divergence from HF's distribution (nats), the
    share of predictions whose most likely token is HF's, and both models' perplexity on the tokens that follow. ``ties`` of the
    others are tokens between which HF's model hardly decides (``difference.at_tie``), and not counted against it."""

    scenario: str
    tokens: int
    max_abs: float
    kl: float
    top1: float
    perplexity: float
    hf_perplexity: float
    passed: bool
    ties: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_hf(config: ModelConfig, identity: dict[str, Any], reader: Source) -> torch.nn.Module:
    """``MixtralForCausalLM`` in float32 on the CPU: loaded by transformers itself from a checkpoint, or filled with the dummy
    weights, or with the numbers that a quantized checkpoint's codes stand for."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if identity["kind"] == "hf" and "quantization" not in identity:
        return MixtralForCausalLM.from_pretrained(
            Path(identity["model_dir"]),
            dtype=torch.float32,
            attn_implementation="eager",
            num_hidden_layers=config.num_hidden_layers,
            local_files_only=True,
        ).eval()
    names: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    names += ("num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "max_position_embeddings")
    names += ("rms_norm_eps", "sliding_window", "tie_word_embeddings")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling_factor}
    hf_config = MixtralConfig(**{name: getattr(config, name) for name in names}, rope_parameters=rope)
    hf_config._attn_implementation = "eager"
    with no_init_weights():  # drawing billions of numbers takes longer than all else
        model = MixtralForCausalLM(hf_config).float().eval()
    model.tie_weights()  # which is part of what is left out
    fill_hf(model, config, reader)
    return model


def fill_hf(model: torch.nn.Module, config: ModelConfig, reader: Source) -> None:
    """Copies weights by their published names into the fused experts of transformers 5."""
    state = model.state_dict()
    rows = config.intermediate_size
    for name, shape in expected_tensors(config).items():
        # torch warns of memory that cannot be written to, as mapped files are
        value = to_torch(np.require(reader.read(name, (0,) * len(shape), shape), requirements=["C", "W"]))
        layer, found, expert = name.partition(".block_sparse_moe.experts.")
        if not found:
            state[name.replace("block_sparse_moe", "mlp")].copy_(value)
            continue
        index, weight, _ = expert.split(".")
        fused = state[f"{layer}.mlp.experts.{'down_proj' if weight == 'w2' else 'gate_up_proj'}"][int(index)]
        start = rows if weight == "w3" else 0
        (fused if weight == "w2" else fused[start : start + rows]).copy_(value)


def hf_logits(model: torch.nn.Module, scenario: Scenario) -> np.ndarray:
    """HF's logits at the same positions, ``[batch, steps, vocab]`` float32, each row in one forward pass."""
    with torch.inference_mode():
        whole = model(torch.from_numpy(scenario.tokens)).logits
    positions = torch.from_numpy(scenario.predicted_positions())
    return whole.gather(1, positions[..., None].expand(-1, -1, whole.shape[-1])).numpy()


def compare(logits: np.ndarray, reference: np.ndarray, scenario: Scenario, tolerance: Tolerance) -> Quality:
    """``logits`` and ``reference`` are ``[batch, steps, vocab]`` float32."""
    found = logits_differ(logits, reference, tolerance)
    targets = scenario.predicted_positions() + 1
    known = targets < scenario.tokens.shape[1]
    following = np.take_along_axis(scenario.tokens, np.where(known, targets, 0), axis=1)

    def perplexity(values: np.ndarray) -> float:
        chosen = np.take_along_axis(log_softmax(values), following[..., None], axis=-1)[..., 0]
        return float(np.exp(-chosen[known].mean())) if known.any() else float("nan")

    return Quality(
        scenario.name,
        known.size,
        found.max_abs,
        found.kl,
        found.top1,
        perplexity(logits),
        perplexity(reference),
        found.passed,
        found.ties,
    )
