"""Recipes of every format, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.recipe import QuantizationRecipe, default_recipe
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, Format, int4

if TYPE_CHECKING:
    from programs import Subject


def recipe_of(name: str, subject: Subject) -> QuantizationRecipe | None:
    """Formats by name; static scales are ones that a random model's activations fit."""
    from moecompiler.calibration.static import with_input_scales

    layers = subject.config.num_hidden_layers
    recipes: dict[str, QuantizationRecipe | None] = {
        "none": None,
        "int8": default_recipe(INT8),
        "int4": default_recipe(int4(16)),
        "int4_asymmetric": default_recipe(int4(16, symmetric=False)),
        "nvfp4": default_recipe(NVFP4),
        "fp8": with_input_scales(default_recipe(FP8), subject.config, lambda name: 0.02),
        "cache_int8": QuantizationRecipe((), cache=CacheQuantization(Format.INT8, ((0.1, 0.1),) * layers)),
        "cache_fp8": QuantizationRecipe((), cache=CacheQuantization(Format.E4M3, ((0.1, 0.1),) * layers)),
    }
    return recipes[name]
