"""Ranks' shares of quantized weights: those of the whole where a scale's weights stay together, finer ones where they do not."""

from __future__ import annotations

import numpy as np
import pytest
from programs import GRID, Subject

from moecompiler.errors import UserError
from moecompiler.materializing import Materializer
from moecompiler.quantization.recipe import QuantizationRecipe, Rule, default_recipe
from moecompiler.quantization.schemes import INT8, WeightScheme, int4
from moecompiler.quantized import numbers_by
from moecompiler.sharding import recipe_for

LAYER = "model.layers.1"
ATTENTION = {f"{LAYER}.self_attn.{each}_proj.weight": axis for each, axis in zip("qkvo", (0, 0, 0, 1), strict=True)}
EXPERTS = {f"{LAYER}.mlp.experts.gate_up_proj": 1, f"{LAYER}.mlp.experts.down_proj": 2}


def numbers(subject: Subject, name: str, mapping: str, rank: int, scheme: WeightScheme | None) -> np.ndarray:
    """What a rank's codes of a weight stand for, ``[..., out, in]``; without a scheme, the weight."""
    recipe = recipe_for(name, subject.config, GRID[mapping], rank, "float32")
    plan = None if scheme is None else default_recipe(scheme)
    return Materializer(subject.reader).tensor(numbers_by(plan, recipe, "float32"))


def joined(subject: Subject, name: str, mapping: str, axis: int, scheme: WeightScheme | None) -> np.ndarray:
    """All ranks' shares as one weight; gate's and up's rows are put back where they are in the whole."""
    shares = [numbers(subject, name, mapping, rank, scheme) for rank in range(GRID[mapping].world_size)]
    if name.endswith("gate_up_proj") and axis == 1:
        halves = [np.split(share, 2, axis=1) for share in shares]
        return np.concatenate([half[which] for which in range(2) for half in halves], axis=1)
    return np.concatenate(shares, axis)


@pytest.mark.parametrize("scheme", [INT8, int4(64), int4(64, symmetric=False)], ids=str)
@pytest.mark.parametrize(("mapping", "weights"), [("tp2", ATTENTION | EXPERTS), ("ep4", dict.fromkeys(EXPERTS, 0))])
def test_shares(shipped: Subject, mapping: str, weights: dict[str, int], scheme: WeightScheme) -> None:
    """Quantizing what a rank holds gives what the quantized whole has there: rows, experts, and columns of whole groups. Where a
    row is split and has one scale, each part has a scale of its own, which is no coarser."""
    for name, axis in weights.items():
        whole, shares = numbers(shipped, name, "one-rank", 0, scheme), joined(shipped, name, mapping, axis, scheme)
        if scheme != INT8 or axis != whole.ndim - 1:
            np.testing.assert_array_equal(shares, whole, err_msg=name)
            continue
        weight = numbers(shipped, name, "one-rank", 0, None)
        assert (shares != whole).any(), name
        assert np.abs(shares - weight).max() <= np.abs(whole - weight).max(), name
        assert np.square(shares - weight).sum() < np.square(whole - weight).sum(), name


def test_tensors_that_are_one_weight(shipped: Subject) -> None:
    recipe = recipe_for(f"{LAYER}.mlp.experts.down_proj", shipped.config, GRID["one-rank"], 0, "float32")
    plan = QuantizationRecipe((Rule("*.experts.3.*", INT8),))
    with pytest.raises(UserError, match=r"experts\.0\.w2 and .*experts\.3\.w2 are one weight here"):
        numbers_by(plan, recipe, "float32")
