"""Schemes and recipes as manifests and weight recipes hold them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.recipe import QuantizationRecipe, Rule
from moecompiler.quantization.schemes import Format, Granularity, WeightScheme


def scheme_to_json(scheme: WeightScheme) -> dict[str, Any]:
    data = asdict(scheme)
    if not scheme.act_order:
        del data["act_order"]
    return data


def scheme_from_json(data: dict[str, Any]) -> WeightScheme:
    """Raises: KeyError, ValueError where the data is not what ``scheme_to_json`` gives."""
    format_, granularity = Format(data["format"]), Granularity(data["granularity"])
    return WeightScheme(format_, granularity, data["block_size"], data.get("act_order", False))


def recipe_to_json(recipe: QuantizationRecipe) -> dict[str, Any]:
    rules = [
        {"match": rule.match, "scheme": None if rule.scheme is None else scheme_to_json(rule.scheme)}
        for rule in recipe.rules
    ]
    scales = {"input_scales": dict(recipe.input_scales)} if recipe.input_scales else {}
    cache = {"cache": recipe.cache.to_json()} if recipe.cache is not None else {}
    return {"rules": rules, **scales, **cache}


def recipe_from_json(data: dict[str, Any]) -> QuantizationRecipe:
    """Raises: KeyError, ValueError where the data is not what ``recipe_to_json`` gives."""
    rules = ((each["match"], each["scheme"]) for each in data["rules"])
    return QuantizationRecipe(
        tuple(Rule(match, None if scheme is None else scheme_from_json(scheme)) for match, scheme in rules),
        tuple(data.get("input_scales", {}).items()),
        CacheQuantization.from_json(data["cache"]) if "cache" in data else None,
    )
