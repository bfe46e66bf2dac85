"""Recipes: which weights are quantized how, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import tiny_config

from moecompiler.checkpoint import expected_tensors
from moecompiler.config import parse_config
from moecompiler.errors import UserError
from moecompiler.quantization.published import linear_stacks
from moecompiler.quantization.recipe import (
    QuantizationRecipe,
    Rule,
    check_recipe,
    default_recipe,
    load_recipe,
    parse_scheme,
)
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, int4

MODEL = parse_config(tiny_config(num_hidden_layers=2), "tiny")
STACKS = linear_stacks(MODEL)
EXAMPLE = """
rules:
- match: model.layers.0.*   # a layer left alone
  scheme: none
- match: "*.self_attn.*"
  scheme: int8
- match: "*.experts.*"
  scheme: int4
  group_size: 64
"""


def test_by_default_attention_and_experts_are_quantized() -> None:
    recipe = default_recipe(INT8)
    linear = {name for stack in STACKS for name in stack}
    for tensor in expected_tensors(MODEL):
        name = tensor.removesuffix(".weight")
        kept = any(word in name for word in ("embed", "lm_head", "norm", "block_sparse_moe.gate"))
        assert recipe.scheme_of(name) == (None if kept else INT8), name
        assert (name in linear) == (not kept)
    check_recipe(recipe, STACKS, "--qformat int8")


def test_the_first_rule_that_matches_decides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(EXAMPLE)
    recipe = load_recipe(path)
    check_recipe(recipe, STACKS, str(path))
    assert recipe.scheme_of("model.layers.0.self_attn.q_proj") is None
    assert recipe.scheme_of("model.layers.1.self_attn.q_proj") == INT8
    assert recipe.scheme_of("model.layers.1.block_sparse_moe.experts.0.w1") == int4(64)
    assert recipe.scheme_of("lm_head") is None
    as_json = tmp_path / "recipe.json"
    as_json.write_text(json.dumps({"rules": [{"match": "*.experts.*", "scheme": "fp8"}]}))
    over = default_recipe(NVFP4).overridden(load_recipe(as_json))
    assert over.scheme_of("model.layers.1.block_sparse_moe.experts.0.w1") == FP8
    assert over.scheme_of("model.layers.1.self_attn.q_proj") == NVFP4


def test_schemes_by_name() -> None:
    names = {
        name: parse_scheme(name, None, "w") for name in ("int8", "fp8", "nvfp4", "none", "int4", "int4_asymmetric")
    }
    assert list(names.values()) == [INT8, FP8, NVFP4, None, int4(128), int4(128, symmetric=False)]
    with pytest.raises(UserError, match=r"w: scheme 'int3' is unknown; known are int8, int4"):
        parse_scheme("int3", None, "w")
    with pytest.raises(UserError, match=r"w: scheme 'fp8' has no group_size"):
        parse_scheme("fp8", 64, "w")
    with pytest.raises(UserError, match=r"w: group_size is 60; it must be a multiple of 8"):
        parse_scheme("int4", 60, "w")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", "is neither YAML nor JSON: while parsing"),
        ("- match: x", "must hold one key, rules"),
        ("rules: 3", "must hold one key, rules"),
        ("rules: []\nmore: 1", "must hold one key, rules"),
        ("rules: [x]", "rule 1: is 'x'; it must have match and scheme"),
        ("rules: [{match: x, scheme: int8}, {match: x, size: 3}]", "rule 2: has the unknown key 'size'"),
        ("rules: [{match: x}]", "rule 1: scheme is None; it must be a string"),
        ("rules: [{scheme: int8}]", "rule 1: match is None"),
        ("rules: [{match: x, scheme: int4, group_size: big}]", "rule 1: group_size is 'big'"),
        ("rules: [{match: x, scheme: int5}]", "rule 1: scheme 'int5' is unknown"),
        ("rules: \xff", "neither YAML nor JSON"),
    ],
)
def test_a_broken_recipe_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        load_recipe(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_no_recipe_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "recipe.yaml")


def test_recipes_that_do_not_fit_the_model() -> None:
    with pytest.raises(
        UserError, match=r"r: '\*\.mlp\.\*' matches none of the weights that can be quantized, such as model"
    ):
        check_recipe(QuantizationRecipe((Rule("*.mlp.*", INT8),)), STACKS, "r")
    for match in ("*.experts.1.*", "*.w3"):
        one = QuantizationRecipe((Rule(match, FP8),))
        with pytest.raises(
            UserError, match=r"r: mixed formats across experts: .*experts\.0\.w1 is to be int8 per channel, .*\.w"
        ):
            check_recipe(default_recipe(INT8).overridden(one), STACKS, "r")
    with pytest.raises(UserError, match=r"is to be kept, .* float8_e4m3fn per tensor"):
        check_recipe(QuantizationRecipe((Rule("*.experts.1.*", FP8),)), STACKS, "r")
