"""Static scales of what meets FP8 weights, from a calibration or a published checkpoint, as engines hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moecompiler.config import ModelConfig
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.schemes import Format


def same_inputs(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """The names of all linear layers that may be quantized; together, those that get the same activations: an attention's
    queries, keys and values, and an expert's w1 and w3."""
    groups: list[tuple[str, ...]] = []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        groups += [tuple(f"{prefix}.self_attn.{part}_proj" for part in "qkv"), (f"{prefix}.self_attn.o_proj",)]
        for expert in range(config.num_local_experts):
            block = f"{prefix}.block_sparse_moe.experts.{expert}"
            groups += [(f"{block}.w1", f"{block}.w3"), (f"{block}.w2",)]
    return tuple(groups)


def wanting_scales(recipe: QuantizationRecipe, config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """Of ``same_inputs`` those weights that are FP8, whose inputs are too."""
    fp8 = (
        tuple(name for name in group if (scheme := recipe.scheme_of(name)) is not None and scheme.format is Format.E4M3)
        for group in same_inputs(config)
    )
    return tuple(group for group in fp8 if group)


def with_input_scales(
    recipe: QuantizationRecipe, config: ModelConfig, scale_of: Callable[[str], float]
) -> QuantizationRecipe:
    """With the scale of each FP8 weight's input; of weights that get the same activations, the largest of theirs: what is
    multiplied with all of them is quantized once."""
    scales: dict[str, float] = {}
    for group in wanting_scales(recipe, config):
        scales |= dict.fromkeys(group, max(map(scale_of, group)))
    return replace(recipe, input_scales=tuple(scales.items()))
