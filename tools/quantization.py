"""What is to be quantized: from options, checked against the model."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as JsonObject
from typing import Any

from moecompiler.calibration.foreign import read_scales
from moecompiler.calibration.identity import model_fingerprint
from moecompiler.calibration.result import Calibration
from moecompiler.calibration.static import wanting_scales, with_input_scales
from moecompiler.config import ModelConfig
from moecompiler.dummy import open_source
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.plugins.quantized.dequantize import form_of
from moecompiler.quantization.as_json import recipe_from_json
from moecompiler.quantization.published import check_parallel, linear_stacks
from moecompiler.quantization.recipe import (
    QuantizationRecipe,
    check_recipe,
    default_recipe,
    load_recipe,
    parse_scheme,
)
from moecompiler.quantization.schemes import Format, WeightScheme
from moecompiler.quantized import Mixed, scheme_for
from moecompiler.sharding import recipe_for
from moecompiler.tools.flags import QuantizationFlags
from moecompiler.tools.quantization_options import KVCacheDType, QFormat

Source = JsonObject[str, Any]  # the identity of a checkpoint, see ``checkpoint.Source.identity``
Measure = Callable[[], Calibration]

_SCHEMES = {
    QFormat.fp8: "fp8",
    QFormat.int8_wo: "int8",
    QFormat.int4_wo: "int4",
    QFormat.int4_awq: "int4",
    QFormat.nvfp4: "nvfp4",
}

_WEIGHTS = (
    *(f"self_attn.{each}_proj.weight" for each in "qkvo"),
    *(f"mlp.experts.{each}_proj" for each in ("gate_up", "down")),
)


def recipe_from_flags(flags: QuantizationFlags) -> QuantizationRecipe | None:
    """What the options ask for; None where they ask for nothing. A recipe's rules come before the defaults of
    ``--qformat`` and ``--use_weight_only``, if both are given.

    Raises: UserError where options contradict each other, or the recipe cannot be read.
    """
    given = None if flags.quantization is None else load_recipe(flags.quantization)
    if flags.use_weight_only and flags.qformat is not None:
        raise UserError(f"--use_weight_only and --qformat {flags.qformat} exclude each other; give one")
    scheme = _default_scheme(flags)
    if scheme is None:
        return given
    default = default_recipe(scheme)
    return default if given is None else default.overridden(given)


def _default_scheme(flags: QuantizationFlags) -> WeightScheme | None:
    """What is to be made of weights that no recipe names; None: nothing."""
    if not flags.use_weight_only and flags.weight_only_precision is not None:
        raise UserError(
            f"--weight_only_precision {flags.weight_only_precision}: goes with --use_weight_only; give that too"
        )
    if flags.use_weight_only:
        return parse_scheme(flags.weight_only_precision or "int8", flags.group_size, "--use_weight_only")
    if flags.qformat is not None and flags.qformat is not QFormat.full_prec:
        return parse_scheme(_SCHEMES[flags.qformat], flags.group_size, f"--qformat {flags.qformat}")
    if flags.group_size is not None:
        raise UserError(
            f"--group_size {flags.group_size}: goes with --use_weight_only or --qformat; give one of them too"
        )
    return None


def checked_recipe(
    flags: QuantizationFlags, config: ModelConfig, mapping: Mapping, source: Source, measure: Measure | None = None
) -> QuantizationRecipe | None:
    """As ``recipe_from_flags``, for a model, how it is split, and the identity of its weights. What options ask for comes before
    what a quantized checkpoint holds. ``measure`` calibrates the model, where FP8 needs static scales and none are given.

    Raises: UserError also where a rule matches nothing, weights that are one tensor are to be quantized differently, graphs have
    no op for a scheme, a rank's share of a weight is not of whole groups, the checkpoint holds other codes, or static scales
    are missing or of another model.
    """
    recipe, held = recipe_from_flags(flags), held_recipe(source)
    if recipe is None:
        if flags.scales is None or flags.kv_cache_dtype != "auto":  # then they are of the cache
            return None
        if held is None:
            raise UserError(
                f"--scales {flags.scales}: goes with --qformat fp8, or a recipe that says so; give that too"
            )
        return with_scales(held, flags, config, source, f"--model_dir {source['model_dir']}")
    if flags.qformat is QFormat.int4_awq:
        _check_awq(source, held, searches=measure is not None)
    where = f"--quantization {flags.quantization}" if flags.quantization is not None else _option(flags)
    stacks = linear_stacks(config)
    check_recipe(recipe, (*stacks, *_head(config)), where)
    _check_head(recipe, config, where)
    if held is not None:
        recipe = held.overridden(recipe)
        for name in (name for stack in stacks for name in stack):
            has, wanted = held.scheme_of(name), recipe.scheme_of(name)
            if has is not None and wanted not in (None, has):
                raise UserError(
                    f"{where}: {name} is {has} in the checkpoint, and cannot be quantized to {wanted} once more; leave it out,"
                    " or give the unquantized checkpoint"
                )
    _check_shares(recipe, config, mapping, where)
    return with_scales(recipe, flags, config, source, where, measure)


def _head(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """The head as a stack of its own, which a rule may name; nothing where its weight is the embedding's."""
    return () if config.tie_word_embeddings else (("lm_head",),)


def _check_head(recipe: QuantizationRecipe, config: ModelConfig, where: str) -> None:
    scheme = recipe.scheme_of("lm_head") if _head(config) else None
    if scheme is not None and scheme.format is Format.E4M3:
        raise UserError(
            f"{where}: lm_head is to be {scheme}, but what the head gets is not calibrated; put a rule for lm_head first, with"
            " scheme none, int8, int4 or nvfp4"
        )


def with_scales(
    recipe: QuantizationRecipe,
    flags: QuantizationFlags,
    config: ModelConfig,
    source: Source,
    where: str,
    measure: Measure | None = None,
) -> QuantizationRecipe:
    """With the static scales of FP8 weights' inputs: those of ``--scales``, or that the checkpoint has, or measured.

    Raises: UserError that begins with ``where``, where there are none, or with the file's name where they are of another model.
    """
    wanting = wanting_scales(recipe, config)
    if not wanting:
        if flags.scales is not None and flags.cache_dtype is KVCacheDType.auto:
            raise UserError(f"--scales {flags.scales}: goes with --qformat fp8; {where} asks for no FP8")
        return recipe
    if flags.scales is not None:
        found = read_scales(flags.scales, config)
        if "model_fingerprint" in found.header:
            found.check_model(model_fingerprint(config, open_source(dict(source), config)))
        return with_input_scales(recipe, config, found.input_scale)
    if all(recipe.input_scale(name) is not None for group in wanting for name in group):
        return recipe
    if measure is None:
        raise UserError(
            f"{where}: {wanting[0][0]} is FP8, and there is no static scale of its inputs; give --scales with what"
            " `moecompiler calibrate` makes"
        )
    return with_input_scales(recipe, config, measure().input_scale)


def _check_awq(source: Source, held: QuantizationRecipe | None, *, searches: bool) -> None:
    """``searches``: whether the verb can. Raises: UserError where there are no scales of AWQ and cannot be."""
    if held is not None:
        raise UserError(
            f"--qformat int4_awq: --model_dir {source['model_dir']} is quantized already; give the unquantized checkpoint"
        )
    if "awq" not in source and not searches:
        raise UserError("--qformat int4_awq: AWQ's search is part of export and compile; give --qformat to these")


def _option(flags: QuantizationFlags) -> str:
    return "--use_weight_only" if flags.qformat is None else f"--qformat {flags.qformat}"


def held_recipe(source: Source) -> QuantizationRecipe | None:
    """What a checkpoint of this identity holds as codes; None where it is not quantized."""
    quantization = source.get("quantization")
    return None if quantization is None else recipe_from_json(quantization)


def held_or_asked(
    flags: QuantizationFlags, config: ModelConfig, mapping: Mapping, source: Source, measure: Measure | None = None
) -> QuantizationRecipe | None:
    """As ``checked_recipe``; where the options ask for nothing, what the checkpoint holds. Raises: as that."""
    held = held_recipe(source)
    if held is not None and recipe_from_flags(flags) is None:
        where = f"--model_dir {source['model_dir']}"
        _check_shares(held, config, mapping, where, held=True)
        return with_scales(held, flags, config, source, where)
    return checked_recipe(flags, config, mapping, source, measure)


def _check_shares(
    recipe: QuantizationRecipe, config: ModelConfig, mapping: Mapping, where: str, *, held: bool = False
) -> None:
    """``held``: all of the recipe is as the checkpoint has it, which options can at most leave out."""
    check_parallel(recipe, config, mapping, where)
    layers = [f"model.layers.{layer}.{weight}" for layer in range(config.num_hidden_layers) for weight in _WEIGHTS]
    for name in (*layers, *(f"{name}.weight" for stack in _head(config) for name in stack)):
        share = recipe_for(name, config, mapping, 0, config.dtype)  # all ranks hold as much
        scheme = scheme_for(share, recipe)
        if scheme is None or isinstance(scheme, Mixed):
            continue
        if form_of(scheme) is None:
            said = f"is {scheme}" if held else f"is to be {scheme}"
            advice = "give a recipe with scheme none" if held else "choose int8, int4 or int4_asymmetric"
            raise UserError(f"{where}: {name} {said}, which engines cannot hold; {advice}")
        ranks = f" on each of {mapping.world_size} ranks" if mapping.world_size > 1 else ""
        if held and share.shape[-1] % (scheme.block_size or 1):
            raise UserError(
                f"{where}: {name}{ranks}: groups of {scheme.block_size} do not divide its {share.shape[-1]} input features;"
                " use fewer tensor-parallel ranks"
            )
        scheme.scale_shape(share.shape, f"{where}: {name}{ranks}")
