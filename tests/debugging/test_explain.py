"""What became of a node or module: every rewrite that touched it, and why the other passes did not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import onnx_graphsurgeon as gs
import pytest
from graphs import program, whole

from moecompiler.debugging.explain import Explained, explain
from moecompiler.debugging.explain_text import explained_text
from moecompiler.debugging.touching import touches
from moecompiler.errors import UserError
from moecompiler.graph import module_of
from moecompiler.passes.cleanup import CleanUp
from moecompiler.passes.common_subexpressions import CommonSubexpressions
from moecompiler.passes.constant_folding import ConstantFolding
from moecompiler.passes.fuse_add_rms_norm import FuseAddRMSNorm
from moecompiler.passes.fuse_rms_norm import FuseRMSNorm
from moecompiler.pipeline import Pass, Rewrite
from moecompiler.weights import Recipe

NORM = """g (float[2, 4] x, float[2, 4] r) => (float[2, 4] y, float[2, 4] h)
    <float two = {2}, float[1] epsilon = {0.01}, int64[1] last = {-1}>
    {
        ["model.layers.0/Add_0"] h = Add (x, r)
        ["model.layers.0.norm/Identity_1"] wide = Identity (h)
        ["model.layers.0.norm/Pow_2"] square = Pow (wide, two)
        ["model.layers.0.norm/ReduceMean_3"] mean = ReduceMean <keepdims=1> (square, last)
        ["model.layers.0.norm/Add_4"] shifted = Add (mean, epsilon)
        ["model.layers.0.norm/Sqrt_5"] root = Sqrt (shifted)
        ["model.layers.0.norm/Reciprocal_6"] inverse = Reciprocal (root)
        ["model.layers.0.norm/Mul_7"] scaled = Mul (wide, inverse)
        ["model.layers.0.norm/Mul_8"] y = Mul (scaled, w)
    }"""
FUSE: tuple[Pass, ...] = (ConstantFolding(), CleanUp(), FuseRMSNorm(), FuseAddRMSNorm())


def explained(subject: str, steps: Sequence[Pass] = FUSE, text: str = NORM) -> Explained:
    return explain(program(text, {"w": whole("w", 4)}), steps, subject)


def test_the_life_of_a_node() -> None:
    """To the node that stands there now."""
    text = explained_text(explained("model.layers.0.norm/Pow_2"))
    assert text.splitlines() == [
        "node model.layers.0.norm/Pow_2",
        "01-constant-folding: leaves it",
        "    its input wide is not constant",
        "02-clean-up: 1 rewrite, nodes: 1 changed",
        "    1: removed Identity, at model.layers.0.norm/Identity_1",
        "        changed with it: model.layers.0.norm/Pow_2",
        "03-fuse-rms-norm: 1 rewrite, nodes: 1 removed, 1 made",
        "    2: fused 7 nodes into RMSNorm, at model.layers.0.norm/Mul_8",
        "        now there: model.layers.0.norm/RMSNorm_8",
        "        removed with it: model.layers.0.norm/Pow_2",
        "04-fuse-add-rms-norm: 1 rewrite, nodes: 1 removed, 1 made",
        "    3: fused Add and RMSNorm, at model.layers.0.norm/RMSNorm_8",
        "        now there: model.layers.0.norm/AddRMSNorm_8",
        "in the end:",
        "    model.layers.0.norm/AddRMSNorm_8: y float[2, 4], h float[2, 4] = "
        "moecompiler::AddRMSNorm<epsilon=0.009999999776482582>(x, r, w)",
    ]


def test_a_node_that_a_pass_makes() -> None:
    found = explained("model.layers.0.norm/RMSNorm_8")
    assert found.appears == 3
    lines = explained_text(found).splitlines()
    assert lines[:3] == [
        "node model.layers.0.norm/RMSNorm_8, made by pass 03",
        "01-constant-folding: not there yet",
        "02-clean-up: not there yet",
    ]
    assert "04-fuse-add-rms-norm: 1 rewrite, nodes: 1 removed, 1 made" in lines


def test_a_node_that_leaves_nothing() -> None:
    lines = explained_text(explained("model.layers.0.norm/Identity_1")).splitlines()
    assert lines[-3:] == [
        "03-fuse-rms-norm: not there any more",
        "04-fuse-add-rms-norm: not there any more",
        "in the end: nothing of it",
    ]


def test_a_module() -> None:
    """Names are those within it; a rewrite elsewhere that takes nodes of it is told too."""
    found = explained("model.layers.0.norm")
    assert [len(verdict.given) for verdict in found.verdicts] == [8, 8, 7, 1]
    lines = explained_text(found).splitlines()
    assert "01-constant-folding: leaves all 8 nodes" in lines
    assert "    7 nodes, Identity_1 for one: its input h is not constant" in lines
    assert "    Mul_8: it writes an output of the graph" in lines
    assert "        changed with it: Pow_2, Mul_7" in lines
    assert lines[-1].startswith("    AddRMSNorm_8: y float[2, 4], h float[2, 4] = moecompiler::AddRMSNorm<")
    layer = explained("model.layers.0")
    assert layer.verdicts[3].touches[0].removed == ("model.layers.0/Add_0", "model.layers.0.norm/RMSNorm_8")


def test_why_a_pattern_did_not_match() -> None:
    """Its nearest miss in the module where it is expected, and that it was expected."""
    wrong = NORM.replace("= Sqrt", "= Exp")
    text = explained_text(explained("model.layers.0.norm", text=wrong))
    assert (
        "03-fuse-rms-norm: leaves all 7 nodes\n    should have matched in model.layers.0.norm (nearest miss: 3 nodes"
        in text
    )
    assert (
        "then at model.layers.0.norm/Exp_5: Exp where Sqrt was expected" not in text
    )  # a node's name is no matter to passes
    assert "then at model.layers.0.norm/Sqrt_5: Exp where Sqrt was expected" in text
    node = explained("model.layers.0.norm/Mul_8", text=wrong).verdicts[2]
    assert node.reasons[0].text == "3 nodes matched, then at model.layers.0.norm/Sqrt_5: Exp where Sqrt was expected"
    assert [each.module for each in node.missed] == ["model.layers.0.norm"]
    inner = explained("model.layers.0.norm/Pow_2", text=wrong).verdicts[2]
    assert [each.text for each in inner.reasons] == [
        "Pow is not the last node of its pattern, Mul",
        "at its nearest 3 nodes of its pattern matched, then: Exp where Sqrt was expected",
    ]


TWICE = """g (float[2] x) => (float[2] y)
    { ["a/Abs_0"] p = Abs (x) ["b/Abs_1"] q = Abs (x) ["b/Neg_2"] s = Neg (q) ["c/Mul_3"] y = Mul (p, s) }"""


def test_a_rewrite_elsewhere() -> None:
    """What is merged away is removed, and what reads it reads something else, though the rewrite is at another node."""
    (touch,) = explain(program(TWICE), (CommonSubexpressions(),), "b").verdicts[0].touches
    assert (touch.change.what, touch.removed, touch.changed) == ("merged Abs into a/Abs_0", ("b/Abs_1",), ("b/Neg_2",))
    assert explain(program(TWICE), (CommonSubexpressions(),), "a/Abs_0").verdicts[0].touches == ()


class CutsOff:
    """Lets ``y`` be written by a node that reads ``x`` alone: all before it is dead, by no rewrite of its own."""

    name = "cuts-off"

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        last = graph.nodes[-1]
        yield Rewrite("elsewhere", "", lambda: "nothing")
        yield Rewrite(last.name, module_of(last.name), partial(self._cut, graph, last))

    def _cut(self, graph: gs.Graph, last: gs.Node) -> str:
        last.inputs = [graph.inputs[0], graph.inputs[0]]
        return "cut off"


def test_nodes_that_die() -> None:
    """Each by the rewrite that took the last of what depended on it; the numbers go on from those of passes before."""
    after, result, found = touches(CutsOff(), program(TWICE), lambda name: name.startswith(("a/", "b/")), first=7)
    assert [(each.change.number, each.removed) for each in found] == [(8, ("a/Abs_0", "b/Abs_1", "b/Neg_2"))]
    assert ([change.number for change in result.changes], len(after.model.graph.node)) == ([7, 8], 1)


def test_a_pass_that_says_nothing() -> None:
    text = explained_text(explain(program(TWICE), (CutsOff(), CutsOff()), "c/Mul_3"))
    assert "02-cuts-off: 1 rewrite\n    4: cut off, at c/Mul_3\n" in text

    class Silent(CutsOff):
        name = "silent"

        def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
            return iter(())

    assert "01-silent: leaves it\n    silent does not say why\n" in explained_text(
        explain(program(TWICE), (Silent(),), "c/Mul_3")
    )


def test_many_nodes_are_counted() -> None:
    chain = " ".join(f'["m/Neg_{i}"] t{i + 1} = Neg (t{i})' for i in range(20))
    text = explained_text(
        explain(program(f'g (float[2] t0) => (float[2] y) {{ {chain} ["m/Abs_20"] y = Abs (t20) }}'), (CleanUp(),), "m")
    )
    assert text.endswith("in the end: 21 nodes: Abs 1, Neg 20\n")
    assert "    21 nodes, Neg_0 for one: Neg is no operator that can do nothing\n" in text


@pytest.mark.parametrize(
    ("subject", "closest"),
    [
        ("model.layers.0.norm/RMSNorm_9", "model.layers.0.norm/RMSNorm_8"),  # made by a pass
        ("model.layers.0.nrm", "model.layers.0.norm"),
        ("nothing of the kind", ""),
    ],
)
def test_an_unknown_name(subject: str, closest: str) -> None:
    with pytest.raises(UserError, match="is no node or module of any graph") as caught:
        explained(subject)
    assert ("closest are" in str(caught.value)) == bool(closest)
    assert closest in str(caught.value)


def test_json() -> None:
    data = explained("model.layers.0.norm/Pow_2").to_json()
    assert (data["is_module"], data["appears"]) == (False, 0)
    assert data["passes"][0]["why_not"] == [
        {"reason": "its input wide is not constant", "nodes": ["model.layers.0.norm/Pow_2"]}
    ]
    assert data["passes"][2]["rewrites"] == [
        {
            "number": 2,
            "what": "fused 7 nodes into RMSNorm",
            "node": "model.layers.0.norm/Mul_8",
            "removed": ["model.layers.0.norm/Pow_2"],
            "changed": [],
            "made": ["model.layers.0.norm/RMSNorm_8"],
        }
    ]
    assert data["left"][0]["op"] == "moecompiler::AddRMSNorm"
