"""Which weights are quantized how: a list of name patterns, in YAML or JSON.

    rules:
    - match: model.layers.0.*        # a layer left alone
      scheme: none
    - match: "*.self_attn.*"
      scheme: int8
    - match: "*.experts.*"
      scheme: int4
      group_size: 64

Names are those of published Mixtral checkpoints without ``.weight``; patterns are shells' (``fnmatch``). The first rule that
matches decides; what none matches is kept as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from moecompiler.errors import UserError
from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, WeightScheme, int4

DEFAULT_GROUP = 128
_FIXED = {"int8": INT8, "fp8": FP8, "nvfp4": NVFP4}
SCHEMES = ("int8", "int4", "int4_asymmetric", "fp8", "nvfp4", "none")


@dataclass(frozen=True)
class Rule:
    """``scheme``: ``None`` keeps what ``match`` matches as it is."""

    match: str
    scheme: WeightScheme | None


@dataclass(frozen=True)
class QuantizationRecipe:
    """Rules, the first that matches first. ``input_scales``: by name of the weight, the static scale of what meets it, for those
    that are FP8. ``cache``: how keys and values are held; ``None``: as floats."""

    rules: tuple[Rule, ...]
    input_scales: tuple[tuple[str, float], ...] = ()
    cache: CacheQuantization | None = None

    def scheme_of(self, name: str) -> WeightScheme | None:
        """How the weight called ``name`` is quantized; ``None``: not at all."""
        return next((rule.scheme for rule in self.rules if fnmatchcase(name, rule.match)), None)

    @cached_property
    def _scales(self) -> dict[str, float]:
        return dict(self.input_scales)

    def input_scale(self, name: str) -> float | None:
        """The static scale of what meets the weight called ``name``; ``None``: there is none."""
        return self._scales.get(name)

    def overridden(self, by: QuantizationRecipe) -> QuantizationRecipe:
        """These rules, after those of ``by``, and these scales, where ``by`` has no others."""
        return QuantizationRecipe(
            by.rules + self.rules, tuple((self._scales | by._scales).items()), by.cache or self.cache
        )


def default_recipe(scheme: WeightScheme) -> QuantizationRecipe:
    """Attention's and the experts' weights; embeddings, head, router and norms are kept."""
    return QuantizationRecipe((Rule("*.self_attn.?_proj", scheme), Rule("*.block_sparse_moe.experts.*", scheme)))


def parse_scheme(name: str, group_size: int | None, where: str) -> WeightScheme | None:
    """``int8``, ``int4``, ``int4_asymmetric``, ``fp8``, ``nvfp4`` or ``none`` (``None``).

    ``group_size``, in input features, is for the int4 ones: 128 if not given. Raises: UserError that begins with ``where``.
    """
    if name not in SCHEMES:
        raise UserError(f"{where}: scheme {name!r} is unknown; known are {', '.join(SCHEMES)}")
    if not name.startswith("int4"):
        if group_size is not None:
            raise UserError(f"{where}: scheme {name!r} has no group_size; int4 and int4_asymmetric have")
        return _FIXED.get(name)
    size = DEFAULT_GROUP if group_size is None else group_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 8 or size % 8:
        raise UserError(f"{where}: group_size is {size!r}; it must be a multiple of 8, say 64 or 128")
    return int4(size, symmetric=name == "int4")


def load_recipe(path: Path) -> QuantizationRecipe:
    """Reads a recipe, YAML or JSON (which is YAML). Raises: UserError that names the file and what in it is wrong."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not isinstance(data.get("rules"), list) or len(data) != 1:
        raise UserError(f"{path}: must hold one key, rules, with a list of rules under it")
    return QuantizationRecipe(tuple(_rule(rule, f"{path}: rule {i}") for i, rule in enumerate(data["rules"], 1)))


def _rule(data: Any, where: str) -> Rule:
    if not isinstance(data, dict):
        raise UserError(f"{where}: is {data!r}; it must have match and scheme, and may have group_size")
    unknown = [key for key in data if key not in ("match", "scheme", "group_size")]
    if unknown:
        raise UserError(f"{where}: has the unknown key {unknown[0]!r}; known are match, scheme and group_size")
    for key in ("match", "scheme"):
        # YAML reads an empty value as null; scheme: none it reads as the string
        if not isinstance(data.get(key), str):
            raise UserError(f"{where}: {key} is {data.get(key)!r}; it must be a string")
    return Rule(data["match"], parse_scheme(data["scheme"], data.get("group_size"), where))


def check_recipe(recipe: QuantizationRecipe, stacks: Sequence[Sequence[str]], where: str) -> None:
    """``stacks``: the names of the weights that are put into one tensor, for all tensors (``published.linear_stacks``).

    Raises: UserError that begins with ``where``, where a rule matches none of them, or where one tensor's weights are to be
    quantized differently.
    """
    names = [name for stack in stacks for name in stack]
    for rule in recipe.rules:
        if not any(fnmatchcase(name, rule.match) for name in names):
            raise UserError(
                f"{where}: {rule.match!r} matches none of the weights that can be quantized, such as {names[0]}"
            )
    for stack in stacks:
        first, *others = [(name, recipe.scheme_of(name)) for name in stack]
        for name, scheme in others:
            if scheme != first[1]:
                raise UserError(
                    f"{where}: mixed formats across experts: {first[0]} is to be {first[1] or 'kept'}, {name}"
                    f" {scheme or 'kept'}; a layer's experts are one tensor"
                )
