"""What is to be quantized: from options, checked against the model."""

from __future__ import annotations

from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.plugins.quantized.dequantize import form_of
from moecompiler.quantization.published import linear_stacks
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


def checked_recipe(flags: QuantizationFlags, config: ModelConfig, mapping: Mapping) -> QuantizationRecipe | None:
    """As ``recipe_from_flags``, for a model and how it is split.

    Raises: UserError also where a rule matches nothing, weights that are one tensor are to be quantized differently, graphs have
    no op for a scheme, or a rank's share of a weight is not of whole groups.
    """
    recipe = recipe_from_flags(flags)
    if recipe is None:
        return None
    where = f"--quantization {flags.quantization}" if flags.quantization is not None else "--use_weight_only"
    check_recipe(recipe, linear_stacks(config), where)
    for layer in range(config.num_hidden_layers):
        for weight in _WEIGHTS:
            name = f"model.layers.{layer}.{weight}"
            share = recipe_for(name, config, mapping, 0, config.dtype)  # all ranks hold as much
            scheme = scheme_for(share, recipe)
            if scheme is None or isinstance(scheme, Mixed):
                continue
            if form_of(scheme) is None:
                raise UserError(
                    f"{where}: {name} is to be {scheme}, which engines cannot hold; choose int8, int4 or int4_asymmetric"
                )
            ranks = f" on each of {mapping.world_size} ranks" if mapping.world_size > 1 else ""
            scheme.scale_shape(share.shape, f"{where}: {name}{ranks}")
    return recipe
