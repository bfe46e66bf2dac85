"""Ranks' shares of FP8 weights: experts apart are those of the whole, bit for bit; parts of a split matrix have
scales of their own."""

from __future__ import annotations

import numpy as np
import pytest
from programs import GRID, Subject
from test_quantized_ranks import ATTENTION, EXPERTS, LAYER, joined, numbers

from moecompiler.materializing import Materializer
from moecompiler.quantization.recipe import default_recipe
from moecompiler.quantization.schemes import FP8
from moecompiler.quantized import numbers_by
from moecompiler.sharding import recipe_for
from moecompiler.weights import Part, Quantized, Recipe
from moecompiler.weights import joined as joined_recipes


def test_experts_apart(shipped: Subject) -> None:
    for name in EXPERTS:
        whole = numbers(shipped, name, "one-rank", 0, FP8)
        np.testing.assert_array_equal(joined(shipped, name, "ep4", 0, FP8), whole)


@pytest.mark.parametrize(("name", "axis"), (ATTENTION | EXPERTS).items())
def test_split_matrices(shipped: Subject, name: str, axis: int) -> None:
    """No worse than the whole's, and not the same."""
    weight, whole = (numbers(shipped, name, "one-rank", 0, scheme) for scheme in (None, FP8))
    shares = joined(shipped, name, "tp2", axis, FP8)
    assert (shares != whole).any()
    errors = [np.linalg.norm(each - weight) / np.linalg.norm(weight) for each in (whole, shares)]
    assert 0.02 < errors[0] < 0.03
    assert errors[1] < 1.02 * errors[0]


def test_what_is_joined_keeps_its_scales(shipped: Subject) -> None:
    """Queries, keys and values as one weight: a scale for each, repeated for its rows; gate and up of every expert too."""
    recipes = [recipe_for(name, shipped.config, GRID["one-rank"], 0, "float32") for name in list(ATTENTION)[:3]]
    merged, tensors = joined_recipes(recipes, 0), Materializer(shipped.reader)
    apart = [tensors.tensor(numbers_by(default_recipe(FP8), each, "float32")) for each in recipes]
    together = tensors.tensor(numbers_by(default_recipe(FP8), merged, "float32"))
    np.testing.assert_array_equal(together, np.concatenate(apart))
    scales = tensors.tensor(Recipe("float32", merged.shape[:1], quantized=Quantized(merged, FP8, Part.SCALES)))
    edges = np.cumsum([len(each) for each in apart])[:-1]
    assert [len(set(part)) for part in np.split(scales, edges)] == [1, 1, 1]
    assert len(set(scales)) == 3
    gate_up = recipe_for(f"{LAYER}.mlp.experts.gate_up_proj", shipped.config, GRID["one-rank"], 0, "float32")
    scales = tensors.tensor(Recipe("float32", gate_up.shape[:2], quantized=Quantized(gate_up, FP8, Part.SCALES)))
    halves = np.abs(tensors.tensor(gate_up)).reshape(shipped.config.num_local_experts, 2, -1)
    expected = halves.max(-1) / np.float32(448)
    np.testing.assert_array_equal(scales.reshape(*halves.shape[:2], -1), np.repeat(expected[..., None], 256, axis=-1))
