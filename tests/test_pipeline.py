"""Running passes: program in, program out, nothing else touched; and the two passes there are on exported Mixtrals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_graphsurgeon as gs
import pytest
from graphs import facts, program, whole
from programs import GRID, MAX_SEQ_LEN, Passage, Programs, Subject, build_and_load, hf_logits, largest_error, run_ranks

from moecompiler.config import ExportOptions
from moecompiler.errors import UserError
from moecompiler.graph import Program, check, module_of, serialize
from moecompiler.passes.cleanup import CleanUp
from moecompiler.passes.constant_folding import ConstantFolding
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.passes.selection import Selection
from moecompiler.pipeline import Missed, Rewrite, apply, in_stable_order, run_passes
from moecompiler.weights import Recipe

SETTLE = (ConstantFolding(), CleanUp(), ConstantFolding(), CleanUp())
DIAMOND = """g (float[2] x) => (float[2] y, float[2] z)
    { ["a"] a = Neg (x) ["b"] b = Abs (a) ["c"] c = Exp (a) ["y"] y = Add (b, c) ["d"] d = Mul (w, c) ["z"] z = Neg (d) }"""
WEIGHTS = {"w": whole("w", 2)}


class Nothing:
    """A pass that does nothing."""

    name = "nothing"

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        yield from ()


class Reverse(Nothing):
    """Turns the list of nodes around, which computes the same."""

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        graph.nodes.reverse()
        yield from ()


class DropZ(Nothing):
    """Takes the output ``z`` away, and with it the only reader of the weight; adds one that nobody reads."""

    name = "drop-z"

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        def drop() -> str:
            graph.outputs = graph.outputs[:1]
            weights["unheard of"] = weights["w"]
            return "dropped"

        yield Rewrite("z", "", drop)


class Loop(Nothing):
    """Feeds a node with what is made of it."""

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        graph.nodes[0].inputs[0] = graph.nodes[1].outputs[0]
        yield from ()


def names(it: Program) -> list[str]:
    return [node.name for node in it.model.graph.node]


def test_a_pass_that_does_nothing_changes_nothing() -> None:
    before = program(DIAMOND, WEIGHTS)
    after, result = apply(Nothing(), before)
    assert facts(after) == facts(before)
    assert (result.name, result.matches, result.nodes_before, result.nodes_after) == ("nothing", 0, 6, 6)
    for mine, theirs in ((after, before), (apply(Nothing(), after)[0], after)):
        assert mine.model.opset_import == theirs.model.opset_import
        assert mine.model.ir_version == theirs.model.ir_version
        assert mine.model.producer_name == theirs.model.producer_name


def test_the_argument_is_left_alone() -> None:
    before = program(DIAMOND, WEIGHTS)
    data = before.model.SerializeToString(deterministic=True)
    for step in (Reverse(), DropZ(), *SETTLE):
        apply(step, before)
        assert before.model.SerializeToString(deterministic=True) == data
        assert before.weights == WEIGHTS


def test_order_is_stable() -> None:
    """Nodes stay in their order where they may, and come after what they read where they may not."""
    before = program(DIAMOND, WEIGHTS)
    assert names(apply(Nothing(), before)[0]) == ["a", "b", "c", "y", "d", "z"]
    assert names(apply(Reverse(), before)[0]) == ["a", "c", "d", "z", "b", "y"]


def test_a_cycle_is_an_error() -> None:
    with pytest.raises(ValueError, match="the graph has a cycle"):
        apply(Loop(), program(DIAMOND, WEIGHTS))


def test_what_nobody_reads_is_dropped() -> None:
    """Nodes, and the recipes of weights."""
    after, result = apply(DropZ(), program(DIAMOND, WEIGHTS))
    assert names(after) == ["a", "b", "c", "y"]
    assert (result.matches, result.nodes_before, result.nodes_after) == (1, 6, 4)
    assert after.weights == {}
    assert list(after.model.graph.initializer) == []


def test_unread_inputs_stay() -> None:
    """The signature of a program is not a pass's to change."""
    before = program("g (float[2] x, float[2] unread) => (float[2] y) { y = Neg (x) }")
    assert [value.name for value in apply(Nothing(), before)[0].model.graph.input] == ["x", "unread"]


def test_passes_run_in_order() -> None:
    told: list[float] = []
    after, results = run_passes((Reverse(), DropZ(), Nothing()), program(DIAMOND, WEIGHTS), told.append)
    assert [result.name for result in results] == ["nothing", "drop-z", "nothing"]
    assert [result.matches for result in results] == [0, 1, 0]
    assert [(result.nodes_before, result.nodes_after) for result in results] == [(6, 6), (6, 4), (4, 4)]
    assert told == pytest.approx([1 / 3, 2 / 3, 1])
    assert names(after) == ["a", "c", "b", "y"]
    assert results[1].to_json() == {"name": "drop-z", "matches": 1, "nodes_before": 6, "nodes_after": 4}


def test_no_passes() -> None:
    before = program(DIAMOND, WEIGHTS)
    assert run_passes((), before) == (before, [])


def test_pipelines_by_name() -> None:
    assert Selection("debug").passes() == ()
    assert [step.name for step in Selection("ootb").passes()] != []
    with pytest.raises(UserError, match="--pipeline fast: there is none of that name; choose from ") as caught:
        Selection("fast").passes()
    for name in named_pipelines():
        assert name in str(caught.value)


# exported Mixtrals: dtype, mapping, rank
EXPORTED = [
    pytest.param(dtype, name, rank, id=f"{dtype}-{name}-{rank}")
    for dtype in ("float32", "bfloat16")
    for name, rank in (("one-rank", 0), ("ep2-pp2", 0))
]


@pytest.mark.parametrize(("dtype", "name", "rank"), EXPORTED)
def test_on_an_exported_model(dtype: str, name: str, rank: int, programs: Programs, shipped: Subject) -> None:
    """Each pass leaves a valid program with its signature and every remaining node named as it was; together they settle,
    and make the same bytes each time."""
    options = ExportOptions(dtype, max_seq_len=MAX_SEQ_LEN)
    exported = current = programs.exported(shipped.config, GRID[name], rank, options)
    for step in SETTLE:
        before, (current, result) = current, apply(step, current)
        check(current)
        assert result.nodes_after == result.nodes_before - result.matches
        assert set(names(current)) < set(names(before)) or not result.matches
        assert {change.node for change in result.changes} == set(names(before)) - set(names(current))
        assert all(change.module == module_of(change.node) for change in result.changes)
        assert current.model.graph.input == exported.model.graph.input
        assert current.model.graph.output == exported.model.graph.output
        assert [n.name for n in before.model.graph.node if n.name in set(names(current))] == names(current)
    settled, results = run_passes(SETTLE, current)
    assert [result.matches for result in results] == [0] * len(SETTLE)
    assert serialize(settled, "rank") == serialize(current, "rank")
    assert serialize(run_passes(SETTLE, exported)[0], "rank") == serialize(current, "rank")

    ops = {node.op_type for node in current.model.graph.node}
    assert not ops & {"Constant", "Identity"}
    transposed = [n for n in current.model.graph.node if n.op_type == "Transpose" and n.input[0] in current.weights]
    assert transposed == []
    assert len(current.weights) == len(exported.weights)
    assert sum(name.endswith(".T") for name in current.weights) > 10


def test_numbers_stay(programs: Programs, shipped: Subject, passage: Passage, tmp_path: Path) -> None:
    """After every pass the program still says what transformers says."""
    options, mapping = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN), GRID["one-rank"]
    program, wanted = programs.exported(shipped.config, mapping, 0, options), hf_logits(shipped.hf, passage)
    for index, step in enumerate((None, *SETTLE[:2])):
        program = program if step is None else apply(step, program)[0]
        directory = tmp_path / str(index)
        directory.mkdir()
        engines = build_and_load([program], shipped, directory)
        assert largest_error(run_ranks(engines, mapping, passage), wanted) < 2e-4


def test_stable_order_of_nodes_alone() -> None:
    """Ties are broken by position, whatever the names."""
    x = gs.Variable("x")
    nodes = [gs.Node("Neg", name=name, inputs=[x], outputs=[gs.Variable(f"{name}.y")]) for name in "cab"]
    graph = gs.Graph(nodes, inputs=[x], outputs=[node.outputs[0] for node in nodes])
    assert [node.name for node in in_stable_order(graph)] == ["c", "a", "b"]


CHAIN = """g (float[2] x) => (float[2] y)
    { ["model.a/n"] a = Identity (x) ["model.b/n"] b = Identity (a) ["model.c/n"] c = Identity (b) ["y"] y = Neg (c) }"""


@pytest.mark.parametrize("limit", range(5))
def test_rewrites_are_numbered_and_limited(limit: int) -> None:
    """Through all passes; what is beyond the limit is left, and what it would have matched is not missed."""
    after, results = run_passes((Nothing(), CleanUp(), Expecting()), program(CHAIN), limit=limit)
    made = [(change.number, change.module) for result in results for change in result.changes]
    assert made == [(1, "model.a"), (2, "model.b"), (3, "model.c")][:limit]
    assert len(after.model.graph.node) == 4 - min(limit, 3)
    assert not any(result.missed for result in results if limit < 3)


class Expecting(Nothing):
    """A pass that always misses something."""

    name = "expecting"

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        for node in graph.nodes:
            if node.op == "Identity":
                yield Rewrite(node.name, "", lambda: "nothing")

    def missed(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Missed]:
        return [Missed("model.a", 1, "n", "it is not there")]


def test_what_a_pass_missed_is_an_error_unless_allowed() -> None:
    with pytest.raises(UserError, match=r"pass expecting: did not match in model.a \(nearest miss: 1 nodes") as caught:
        run_passes((Expecting(),), program(CHAIN))
    assert "\n" not in str(caught.value)
    _, (result,) = run_passes((Expecting(),), program(CHAIN), allow_missed=True)
    assert result.to_json()["missed"] == ["model.a (nearest miss: 1 nodes matched, then at n: it is not there)"]


def test_each_pass_can_be_watched() -> None:
    seen: list[tuple[int, str, int]] = []
    run_passes(
        (Nothing(), CleanUp()),
        program(CHAIN),
        watch=lambda index, made, result: seen.append((index, result.name, len(made.model.graph.node))),
    )
    assert seen == [(0, "nothing", 4), (1, "clean-up", 1)]
