"""FP8 through verify and bisect: the graph before, with numbers and rounded inputs; planted mistakes are named."""

from __future__ import annotations

import onnx_graphsurgeon as gs
import pytest
from fp8 import fp8_recipe
from planted import MakeSubject, Wrong
from programs import Subject

from moecompiler.debugging.bisect import bisect
from moecompiler.debugging.verify import verify
from moecompiler.passes.fuse_moe import FuseMoE
from moecompiler.passes.quantize_weights import QuantizeWeights
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.tools.passes.bisect import accuracy_check
from moecompiler.weights import Recipe

pytestmark = pytest.mark.xdist_group("debugging")


class SwappedScales(Wrong):
    """An MoE with the static scales of its two products' inputs in each other's place."""

    def __init__(self, at: int, recipe: QuantizationRecipe):
        self.inner = QuantizeWeights(recipe)  # type: ignore[assignment]
        super().__init__(at)

    def spoil(self, node: gs.Node, weights: dict[str, Recipe]) -> None:
        assert node.op == "MoEFp8"
        node.inputs[6], node.inputs[7] = node.inputs[7], node.inputs[6]


def test_swapped_scales_are_found(subject_of: MakeSubject, shipped: Subject) -> None:
    """Rewrite 10 is layer 1's MoE: each layer has four products and one MoE."""
    recipe, subject = fp8_recipe(shipped), subject_of("one-rank")
    right = (FuseMoE(), QuantizeWeights(recipe))
    rows = [row for row, _ in verify(subject, right, against_hf=False)]
    assert [row.passed for row in rows] == [True, True, True]
    wrong = (FuseMoE(), SwappedScales(10, recipe))
    rows = [row for row, _ in verify(subject, wrong, against_hf=False)]
    assert not rows[-1].passed
    assert rows[-1].enters == "model.layers.1.mlp"
    culprit = bisect(subject, wrong, accuracy_check(subject))
    assert culprit.change is not None
    assert (culprit.name, culprit.change.module) == ("quantize-weights", "model.layers.1.mlp")
