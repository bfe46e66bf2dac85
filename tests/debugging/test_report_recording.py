"""What the report says of a rewrite: the same as running the pass up to it and no further; alike ones come together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from graphs import program, whole
from planted import STEPS, BadConstant, MakeSubject

from moecompiler.debugging.region import changed_region
from moecompiler.debugging.report.fragment import Fragment, Mark
from moecompiler.debugging.report.kinds import kinds_of, without_numbers
from moecompiler.debugging.report.recording import Recorded, record
from moecompiler.debugging.touched import Touched
from moecompiler.graph import Program
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import Pass, Rewrite, apply
from moecompiler.weights import Recipe

pytestmark = pytest.mark.xdist_group("debugging")


def marked(fragment: Fragment, *marks: Mark) -> list[str]:
    return [node.name for node in fragment.nodes if node.mark in marks]


def recorded(step: Pass, before: Program) -> list[Recorded]:
    return list(record(step, before, apply(step, before)[0], 1))


def check(step: Pass, before: Program, numbers: list[int]) -> None:
    """The recorded rewrites of these numbers (negative: from the end), against graphs made without and with each."""
    _, result = apply(step, before)
    all_of_them = recorded(step, before)
    assert [each.change for each in all_of_them] == list(result.changes)
    for each in (all_of_them[number - (number > 0)] for number in numbers):
        without, with_it = (apply(step, before, limit=each.change.number - missing)[0] for missing in (1, 0))
        region = changed_region(without, with_it)
        removed = marked(each.before, Mark.removed, Mark.changed)
        added = marked(each.after, Mark.added, Mark.changed)
        assert {*removed} <= {*region.removed}
        assert {*added} <= {*region.added}
        assert len(removed) + each.before.omitted == len(region.removed)
        assert len(added) + each.after.omitted == len(region.added)
        assert not {*marked(each.before, Mark.context)} & {*region.removed, *region.added}


def test_rewrites_of_an_export(subject_of: MakeSubject) -> None:
    (before,) = subject_of("one-rank", tidy=False).load()
    for step in named_pipelines()["plugins"][:5]:
        after, result = apply(step, before)
        if result.changes:
            check(step, before, [len(result.changes) // 2, -1])
        before = after


def test_rewrites_that_fuse(subject_of: MakeSubject) -> None:
    (before,) = subject_of("one-rank").load()
    for step in STEPS:
        check(step, before, [1, -1])
        before, _ = apply(step, before)


def test_a_picture_has_neighbours_types_and_weights(subject_of: MakeSubject) -> None:
    (before,) = subject_of("one-rank").load()
    first = recorded(STEPS[0], before)[0]
    (norm,) = (node for node in first.after.nodes if node.mark == Mark.added)
    assert norm.op == "moecompiler::RMSNorm"
    assert norm.attributes == "epsilon=1e-05"
    assert norm.constants == ("1: model.layers.0.input_layernorm.weight float[128]",)
    assert [first.after.tensors[name].type for name in norm.outputs] == ["float[batch, sequence, 128]"]
    around = [node.op for node in first.after.nodes if node.mark == Mark.context]
    assert around == ["Gather", "MatMul", "MatMul", "MatMul"]
    assert around == [node.op for node in first.before.nodes if node.mark == Mark.context]


def test_alike_rewrites_are_one_kind(subject_of: MakeSubject) -> None:
    """On two ranks of four layers each; the last attention also leaves what made its masks and angles without a reader."""
    before = subject_of("ep2").load()
    for step in STEPS[:3]:
        after = [apply(step, each)[0] for each in before]
        ranks = [(rank, each) for rank, old in enumerate(before) for each in record(step, old, after[rank], 1)]
        kinds = kinds_of(ranks)
        assert [(rank, each.change.number) for rank, each in ranks] == sorted(
            (rank, each.number) for kind in kinds for each in kind.rewrites for rank in each.ranks
        )
        before = after
    (moe,) = kinds
    assert moe.module == "model.layers.N.mlp.experts"
    assert [(each.ranks, each.number, each.module) for each in moe.rewrites] == [
        ((0, 1), layer + 1, f"model.layers.{layer}.mlp.experts") for layer in range(4)
    ]
    assert moe.to_json()["count"] == 8


def test_another_shape_is_another_kind() -> None:
    text = """agraph (float[2] x) => (float[2] y, float[2] z) {
        ["a.0/Identity_1"] p = Identity (x)  ["a.0/Neg_2"] y = Neg (p)
        ["a.1/Identity_3"] q = Identity (x)  ["a.1/Exp_4"] z = Exp (q)
    }"""
    clean_up = named_pipelines()["ootb"][1]
    kinds = kinds_of((0, each) for each in recorded(clean_up, program(text)))
    assert [(kind.what, kind.module, kind.changed_ops) for kind in kinds] == [
        ("removed Identity", "a.N", ["Neg"]),
        ("removed Identity", "a.N", ["Exp"]),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.experts.3.w1/MatMul_40", "model.layers.N.mlp.experts.N.w1/MatMul_N"),
        ("merged Mul into a.0/Mul_7", "merged Mul into a.N/Mul_N"),
        ("fused 8 nodes into RMSNorm", "fused 8 nodes into RMSNorm"),
        ("w1/2d", "w1/2d"),
    ],
)
def test_numbers_of_names(name: str, expected: str) -> None:
    assert without_numbers(name) == expected


GRAPH = """agraph (float[2] x) => (float[2] y) <float[2] c = {1.0, 2.0}> {
    ["a"] p = Neg (x)  ["b"] q = MatMul (p, w)  ["unread"] r = Exp (p)  ["c"] y = Add (q, c)
}"""


class Does:
    """A pass of one rewrite, whatever that is."""

    name = "does"

    def __init__(self, change: Callable[[gs.Graph, dict[str, Recipe]], None]):
        self.change = change

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        def apply() -> str:
            self.change(graph, weights)
            return "done"

        yield Rewrite("c", "", apply)


def new_constant(graph: gs.Graph, weights: dict[str, Recipe]) -> None:
    graph.tensors()["c"].values = graph.tensors()["c"].values * 2


def new_weight(graph: gs.Graph, weights: dict[str, Recipe]) -> None:
    weights["w"] = whole("other", 2, 2)


def new_attribute(graph: gs.Graph, weights: dict[str, Recipe]) -> None:
    graph.nodes[1].attrs["note"] = 1


def read_the_unread(graph: gs.Graph, weights: dict[str, Recipe]) -> None:
    add = next(node for node in graph.nodes if node.name == "c")
    add.inputs[0] = graph.tensors()["r"]


def only_look(graph: gs.Graph, weights: dict[str, Recipe]) -> None:
    assert graph.tensors()["c"].values.sum() == np.float32(3)  # which loads the values


def take_out(graph: gs.Graph, weights: dict[str, Recipe]) -> None:
    node = next(node for node in graph.nodes if node.name == "a")
    for reader in list(node.outputs[0].outputs):
        reader.inputs[0] = graph.inputs[0]
    graph.nodes.remove(node)


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (new_constant, ["~c"], ["~c"]),
        (new_weight, ["~b"], ["~b"]),
        (new_attribute, ["~b"], ["~b"]),
        (read_the_unread, ["-b", "~c"], ["+unread", "~c"]),
        (only_look, [], []),
        (take_out, ["-a", "~b"], ["~b"]),
    ],
)
def test_every_way_to_change_a_graph_is_seen(
    change: Callable[..., object], before: list[str], after: list[str]
) -> None:
    signs = {Mark.removed: "-", Mark.added: "+", Mark.changed: "~"}
    (each,) = recorded(Does(change), program(GRAPH, {"w": whole("w", 2, 2)}))
    for fragment, expected in ((each.before, before), (each.after, after)):
        found = [f"{signs[node.mark]}{node.name}" for node in fragment.nodes if node.mark in signs]
        assert found == expected


def test_what_a_pass_does_without_a_rewrite_is_shown_too(subject_of: MakeSubject) -> None:
    (before,) = subject_of("one-rank").load()
    (each,) = recorded(BadConstant(1), before)
    assert each.change.number == 0
    assert each.change.what == "changed without a rewrite"
    assert [node.op for node in each.before.nodes if node.mark == Mark.changed] == ["Mul"]
    assert [node.op for node in each.after.nodes if node.mark == Mark.changed] == ["Sub"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda node, x, p: node["b"].inputs.__setitem__(0, x), {"a", "b"}),
        (lambda node, x, p: setattr(node["b"], "inputs", [x]), {"a", "b"}),
        (lambda node, x, p: p.outputs.clear(), {"a", "b"}),
        (lambda node, x, p: node["a"].outputs.pop(), {"a", "b"}),
        (lambda node, x, p: p.inputs.append(node["c"]), {"a", "b", "c"}),
        (lambda node, x, p: None, set()),
    ],
)
def test_touched_nodes_are_noted(change: Callable[..., object], expected: set[str]) -> None:
    """By onnx-graphsurgeon's own means, which nothing but its code says will stay: were they to go, the report would be slow."""
    text = 'agraph (float[2] x, float[2] w) => (float[2] y, float[2] z) { ["a"] p = Neg (x) ["b"] y = Exp (p) ["c"] z = Abs (w) }'
    graph = gs.import_onnx(program(text).model)
    tensors, nodes = graph.tensors(), {node.name: node for node in graph.nodes}
    touched = Touched(graph.nodes)
    change(nodes, tensors["x"], tensors["p"])
    assert {node.name for node in touched.take()} == expected
    assert touched.take() == []
