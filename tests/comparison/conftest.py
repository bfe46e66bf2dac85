"""The shipped model's programs in every format."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import pytest

from moecompiler.config import ExportOptions, NormalizationMode
from moecompiler.graph import Program
from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.recipe import QuantizationRecipe, default_recipe
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, Format, int4

if TYPE_CHECKING:
    from programs import Programs, Subject


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


@pytest.fixture(scope="session")
def fused(programs: Programs, shipped: Subject) -> Callable[..., Program]:
    """The shipped model's program for one rank after the pipeline ``plugins``: ``(dtype, format, mode)``."""
    from programs import GRID, MAX_SEQ_LEN

    from moecompiler.passes.pipelines import PLUGINS, named_pipelines
    from moecompiler.pipeline import run_passes

    @cache
    def made(
        dtype: str = "float32", form: str = "none", mode: NormalizationMode = NormalizationMode.RENORMALIZE
    ) -> Program:
        options = ExportOptions(dtype, mode, MAX_SEQ_LEN)
        exported = programs.exported(shipped.config, GRID["one-rank"], 0, options)
        return run_passes(named_pipelines(recipe_of(form, shipped))[PLUGINS], exported)[0]

    return made
