"""Which weights of a program are quantized how, and the numbers they then stand for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from moecompiler.errors import UserError
from moecompiler.graph import Program
from moecompiler.quantization.recipe import QuantizationRecipe, Rule
from moecompiler.quantization.schemes import Format, WeightScheme
from moecompiler.weights import Part, Quantized, Recipe

# what may be quantized: attention's projections, the experts, and the head
_LINEAR = re.compile(r".*\.self_attn\.[qkvo]_proj|.*\.block_sparse_moe\.experts\..*|lm_head")


@dataclass(frozen=True)
class Mixed:
    """Tensors that are one weight and are to be quantized differently."""

    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.first} and {self.second} are one weight here, and are to be quantized differently"


def published_name(source: str) -> str:
    """A tensor's name as recipes know it: ``transformers`` 5 calls experts' modules otherwise than checkpoints do."""
    return source.removesuffix(".weight").replace(".mlp.experts.", ".block_sparse_moe.experts.")


def scheme_for(recipe: Recipe, plan: QuantizationRecipe) -> WeightScheme | Mixed | None:
    """How ``plan`` quantizes a weight; None where it keeps it, or it is none that may be quantized."""
    if not recipe.is_boxes or len(recipe.shape) < 2:
        return None
    names = sorted(map(published_name, recipe.sources))
    schemes = {name: plan.scheme_of(name) if _LINEAR.fullmatch(name) else None for name in names}
    for name in names[1:]:
        if schemes[name] != schemes[names[0]]:
            return Mixed(names[0], name)
    return schemes[names[0]] if names else None


def quantized_weights(weights: Mapping[str, Recipe], plan: QuantizationRecipe) -> dict[str, Any]:
    """What ``inspect`` shows: how many weights are held as codes of which scheme, and which are not although ``plan`` says so."""
    codes = [
        recipe.quantized for recipe in weights.values() if recipe.quantized and recipe.quantized.part is Part.CODES
    ]
    left = {published_name(source) for r in weights.values() if scheme_for(r, plan) is not None for source in r.sources}
    return {"schemes": dict(sorted(Counter(str(each.scheme) for each in codes).items())), "kept": sorted(left)}


def without(plan: QuantizationRecipe, kept: Iterable[str]) -> QuantizationRecipe:
    """The plan, but for weights of these names, which are kept as they are."""
    return plan.overridden(QuantizationRecipe(tuple(Rule(name, None) for name in kept)))


def formats_of(plan: QuantizationRecipe | None) -> frozenset[Format]:
    """The formats that weights may be in, and the KV cache."""
    rules = () if plan is None else plan.rules
    cache = {plan.cache.format} if plan is not None and plan.cache is not None else set()
    return frozenset({rule.scheme.format for rule in rules if rule.scheme is not None} | cache)


def numbers_by(plan: QuantizationRecipe | None, recipe: Recipe, dtype: str) -> Recipe:
    """The weight ``[..., out, in]`` as it is after quantizing by ``plan``: itself, or, in ``dtype``, the numbers that its codes
    stand for.

    Raises: UserError where it is of tensors that are to be quantized differently.
    """
    scheme = None if plan is None else scheme_for(recipe, plan)
    if isinstance(scheme, Mixed):
        raise UserError(str(scheme))
    return recipe if scheme is None else numbers_of(recipe, scheme, dtype)


def numbers_of(recipe: Recipe, scheme: WeightScheme, dtype: str, *, transposed: bool = False) -> Recipe:
    """The weight that the codes of ``recipe`` ``[..., out, in]`` stand for, in ``dtype``; ``transposed``: it, and the result, are
    ``[..., in, out]``."""
    rank = len(recipe.shape)
    perm = (*range(rank - 2), rank - 1, rank - 2) if transposed else ()
    source = recipe.transposed(perm) if transposed else recipe
    return Recipe(dtype, recipe.shape, quantized=Quantized(source, scheme, Part.WEIGHT, perm))


def formats(programs: Iterable[Program]) -> frozenset[Format]:
    """The formats that weights of the programs are in as codes; E4M3 also where caches hold codes, whatever these are."""
    programs = tuple(programs)
    recipes = (recipe for program in programs for recipe in program.weights.values())
    found = {r.quantized.scheme.format for r in recipes if r.quantized and r.quantized.part is Part.CODES}
    return frozenset(found | ({Format.E4M3} if caches_of_codes(programs) else set()))


def caches_of_codes(programs: Iterable[Program]) -> bool:
    """Whether the KV caches of the programs hold codes."""
    inputs = (value for program in programs for value in program.model.graph.input)
    int8 = onnx.TensorProto.INT8
    return any(v.name.startswith("past_key_values.") and v.type.tensor_type.elem_type == int8 for v in inputs)
