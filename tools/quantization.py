"""What is to be quantized: from options, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping as JsonObject
from typing import Any

from moecompiler.config import ModelConfig
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
from moecompiler.quantized import Mixed, scheme_for
from moecompiler.sharding import recipe_for
from moecompiler.tools.flags import QuantizationFlags

Source = JsonObject[str, Any]  # the identity of a checkpoint, see ``checkpoint.Source.identity``

_WEIGHTS = (
    *(f"self_attn.{each}_proj.weight" for each in "qkvo"),
    *(f"mlp.experts.{each}_proj" for each in ("gate_up", "down")),
)


def recipe_from_flags(flags: QuantizationFlags) -> QuantizationRecipe | None:
    """What the options ask for; None where they ask for nothing. A recipe's rules come before the defaults of
    ``--use_weight_only``, if both are given.

    Raises: UserError where options contradict each other, or the recipe cannot be read.
    """
    given = None if flags.quantization is None else load_recipe(flags.quantization)
    if not flags.use_weight_only:
        for option, value in (
            ("--weight_only_precision", flags.weight_only_precision),
            ("--group_size", flags.group_size),
        ):
            if value is not None:
                raise UserError(f"{option} {value}: goes with --use_weight_only; give that too")
        return given
    scheme = parse_scheme(flags.weight_only_precision or "int8", flags.group_size, "--use_weight_only")
    assert scheme is not None
    default = default_recipe(scheme)
    return default if given is None else default.overridden(given)


def checked_recipe(
    flags: QuantizationFlags, config: ModelConfig, mapping: Mapping, source: Source
) -> QuantizationRecipe | None:
    """As ``recipe_from_flags``, for a model, how it is split, and the identity of its weights. What options ask for comes before
    what a quantized checkpoint holds.

    Raises: UserError also where a rule matches nothing, weights that are one tensor are to be quantized differently, graphs have
    no op for a scheme, a rank's share of a weight is not of whole groups, or the checkpoint holds other codes.
    """
    recipe, held = recipe_from_flags(flags), held_recipe(source)
    if recipe is None:
        return None
    where = f"--quantization {flags.quantization}" if flags.quantization is not None else "--use_weight_only"
    stacks = linear_stacks(config)
    check_recipe(recipe, stacks, where)
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
    return recipe


def held_recipe(source: Source) -> QuantizationRecipe | None:
    """What a checkpoint of this identity holds as codes; None where it is not quantized."""
    quantization = source.get("quantization")
    return None if quantization is None else recipe_from_json(quantization["rules"])


def held_or_asked(
    flags: QuantizationFlags, config: ModelConfig, mapping: Mapping, source: Source
) -> QuantizationRecipe | None:
    """As ``checked_recipe``; where the options ask for nothing, what the checkpoint holds. Raises: as that."""
    asked, held = checked_recipe(flags, config, mapping, source), held_recipe(source)
    if asked is not None or held is None:
        return asked
    _check_shares(held, config, mapping, f"--model_dir {source['model_dir']}", held=True)
    return held


def _check_shares(
    recipe: QuantizationRecipe, config: ModelConfig, mapping: Mapping, where: str, *, held: bool = False
) -> None:
    """``held``: all of the recipe is as the checkpoint has it, which options can at most leave out."""
    check_parallel(recipe, config, mapping, where)
    for layer in range(config.num_hidden_layers):
        for weight in _WEIGHTS:
            name = f"model.layers.{layer}.{weight}"
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
