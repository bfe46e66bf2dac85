"""How the KV cache is held: from options, and scales from where there are some."""

from __future__ import annotations

import sys
from collections.abc import Callable
from collections.abc import Mapping as JsonObject
from dataclasses import replace
from pathlib import Path
from typing import Any

from moecompiler.calibration.foreign import read_scales
from moecompiler.calibration.identity import model_fingerprint
from moecompiler.calibration.result import Calibration
from moecompiler.config import ModelConfig
from moecompiler.dummy import open_source
from moecompiler.errors import UserError
from moecompiler.quantization.cache import CACHE_FORMATS, CacheQuantization
from moecompiler.quantization.published_config import load_published_config
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.schemes import Format
from moecompiler.tools.flags import QuantizationFlags

LARGEST = {Format.E4M3: 448.0, Format.INT8: 127.0}


def with_cache(
    recipe: QuantizationRecipe | None,
    flags: QuantizationFlags,
    config: ModelConfig,
    source: JsonObject[str, Any],
    measure: Callable[[], Calibration] | None = None,
) -> QuantizationRecipe | None:
    """``recipe``, with the cache that the options ask for; as it is where they ask for none. FP8 attention in prefill may be
    asked for of the FP8 cache that ``recipe`` has.

    Scales are those of ``--scales``, else those that the checkpoint has, else measured. An FP8 cache whose scales nobody knows
    has scales of 1, as TensorRT-LLM's.
    Raises: UserError where options contradict each other, or scales are missing or of another model.
    """
    form = CACHE_FORMATS.get(flags.cache_dtype)
    context = flags.use_fp8_context_fmha == "enable"
    told = recipe.cache if recipe is not None else None
    if context and form is None and recipe is not None and told is not None and told.format is Format.E4M3:
        return replace(recipe, cache=replace(told, fp8_context=True))
    if context and form is not Format.E4M3:
        raise UserError("--use_fp8_context_fmha enable: reads an FP8 cache; give --kv_cache_dtype fp8 too")
    if form is None:
        return recipe
    found = _calibration(flags, config, source, form, measure)
    names = [f"model.layers.{layer}.self_attn" for layer in range(config.num_hidden_layers)]
    scales = tuple((1.0, 1.0) if found is None else found.cache_scales(name, LARGEST[form]) for name in names)
    return replace(recipe or QuantizationRecipe(()), cache=CacheQuantization(form, scales, context))


def _calibration(
    flags: QuantizationFlags,
    config: ModelConfig,
    source: JsonObject[str, Any],
    form: Format,
    measure: Callable[[], Calibration] | None,
) -> Calibration | None:
    option = f"--kv_cache_dtype {flags.cache_dtype}"
    if flags.scales is not None:
        found = read_scales(flags.scales, config)
        if "model_fingerprint" in found.header:
            found.check_model(model_fingerprint(config, open_source(dict(source), config)))
        return found
    folder = Path(source["model_dir"]) if source["kind"] == "hf" else None
    said = load_published_config(folder) if folder is not None else None
    if folder is not None and said is not None and said.kv_cache is not None:
        return read_scales(folder, config)
    if source["kind"] == "hf" and measure is not None:
        return measure()
    if form is Format.INT8:
        raise UserError(f"{option}: needs the scales of keys and values; give --scales with what `calibrate` makes")
    print(f"note: {option}: no --scales are given, so keys and values are rounded with a scale of 1", file=sys.stderr)
    return None
