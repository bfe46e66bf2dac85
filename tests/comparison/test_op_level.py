"""Nodes of the shipped model alone: two programs that are the same, and one that is wrong in a node, for a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from polygraphy.backend.base import BaseRunner

from moecompiler.comparison import expert_by_expert
from moecompiler.comparison.capture import Captured, capture
from moecompiler.comparison.nodes import op_node, select
from moecompiler.comparison.op_level import Programs, measure_ops
from moecompiler.comparison.result import OpLevel
from moecompiler.comparison.runners import BodiesOnOnnxRuntime, infer
from moecompiler.comparison.thresholds import bounds_for
from moecompiler.comparison.verdict import verdict
from moecompiler.config import ExportOptions
from moecompiler.graph import Program
from moecompiler.materializing import Materializer
from moecompiler.validation.place import Arrays
from moecompiler.validation.runners import ModuleRunner
from moecompiler.validation.scenario import Scenario

if TYPE_CHECKING:
    from programs import Passage, Programs, Subject

LAYER = 2


@pytest.fixture(scope="module")
def scenario(passage: Passage) -> Scenario:
    return Scenario("text", passage.tokens[:2, :20], (9, 6), 2)


@pytest.fixture(scope="module")
def captured(shipped: Subject, fused: Callable[..., Program], scenario: Scenario) -> list[Captured]:
    from programs import GRID

    program = fused("float16")
    names = {node.name for node in select(program.model, [LAYER])}
    return capture([program], GRID["one-rank"], shipped.reader, scenario.steps()[0], names)


class Wrong:
    """Bodies, of which ``spoil`` changes the outputs of those of one op."""

    def __init__(self, shipped: Subject, op: str, spoil: Callable[[Arrays, Arrays], Any]):
        self._inner, self._op, self._spoil = BodiesOnOnnxRuntime(shipped.reader, 1), op, spoil

    def __call__(self, program: Program, examples: Sequence[Arrays]) -> BaseRunner:
        runner = self._inner(program, examples)
        runner.activate()

        def call(feeds: Arrays) -> Arrays:
            outputs = infer(runner, feeds)
            if program.model.graph.node[-1].op_type == self._op:
                self._spoil(feeds, outputs)
            return outputs

        return ModuleRunner(call, examples[0], "wrong")


def measure(shipped: Subject, captured: list[Captured], op: str, spoil: Callable[[Arrays, Arrays], Any]) -> OpLevel:
    programs = Programs(
        {"plugins": Wrong(shipped, op, spoil), "ootb": BodiesOnOnnxRuntime(shipped.reader, 1)}, frozenset({"ootb"})
    )
    return measure_ops(captured, np.array([9, 6]), programs, lambda rank: Materializer(shipped.reader))


def test_the_same_is_no_further(shipped: Subject, captured: list[Captured]) -> None:
    level = measure(shipped, captured, "", lambda feeds, outputs: None)
    assert {case.op for case in level.cases} == {"Attention", "MoE", "AddRMSNorm"}
    assert {case.layer for case in level.cases} == {LAYER}
    assert all(case.no_further and case.ratio in (None, 1.0) for case in level.cases)
    means = {
        case.op: case.errors["ootb"].mean
        for case in level.cases
        if case.case == "real" and case.output in ("y", "output")
    }
    assert all(0.15 < mean < 2 for mean in means.values())  # rounding's, in units in the last place
    assert all(case.errors["ootb"].max == 0 for case in level.cases if case.case == "zeros")
    assert {time.op for time in level.times} == {"Attention", "MoE", "AddRMSNorm"}
    assert all(time.program == "ootb" and time.milliseconds > 0 for time in level.times)
    checks = verdict(bounds_for("float16"), op=level)
    assert len(checks) == 3
    assert all(check.passed for check in checks)


def wrong_for_17(feeds: Arrays, outputs: Arrays) -> None:
    (y,) = outputs.values()
    if len(y) == 17:
        y[-1] *= 1.01


def forgets_last_slot(feeds: Arrays, outputs: Arrays) -> None:
    for array in outputs.values():
        if array.ndim == 4:
            array[:, :, -1] = 0


@pytest.mark.parametrize(
    ("op", "spoil", "case", "output"),
    [("MoE", wrong_for_17, "ragged", "y"), ("Attention", forgets_last_slot, "cache_end", "present_key")],
)
def test_what_is_wrong_for_one_shape_is_found_there(
    shipped: Subject, captured: list[Captured], op: str, spoil: Any, case: str, output: str
) -> None:
    mine = [each for each in captured if each.node.op == op]
    level = measure(shipped, mine, op, spoil)
    found = {(each.case, each.output) for each in level.cases if not each.no_further}
    assert (case, output) in found
    assert {each for each, _ in found} == {case}
    failed = [check for check in verdict(bounds_for("float16"), op=level) if not check.passed]
    assert failed
    assert all(case in check.subject and check.value > check.bound for check in failed)


def test_capture_is_what_nodes_are_fed(
    shipped: Subject, fused: Callable[..., Program], captured: list[Captured], scenario: Scenario
) -> None:
    """Against the graph run in one piece."""
    from moecompiler.backends.onnxruntime_program import WeightCache
    from moecompiler.debugging.observe import feeds_of, run_prefix

    program, step = fused("float16"), scenario.steps()[0]
    feeds, weights = feeds_of(program, step, step.input_ids), WeightCache(shipped.reader)
    for each in captured:
        tensors = [tensor for op, tensor in each.node.fed.items() if op != "router"]
        expected = run_prefix(program, weights, feeds, tensors)
        for op, tensor in each.node.fed.items():
            if op != "router":
                np.testing.assert_allclose(each.feeds[op], expected[tensor], rtol=2e-3, atol=2e-3)
    assert [each.node.op for each in captured] == ["AddRMSNorm", "Attention", "AddRMSNorm", "MoE"]
    assert captured[-1].feeds["router"].shape == (8, 128)


@pytest.mark.slow
def test_capture_of_several_ranks(shipped: Subject, programs: Programs, scenario: Scenario) -> None:
    """Each stage's first rank is looked into, in its share of the model; what ranks exchange, they exchange."""
    from programs import GRID, MAX_SEQ_LEN

    from moecompiler.passes.pipelines import PLUGINS, named_pipelines
    from moecompiler.pipeline import run_passes

    mapping, options = GRID["tp2-pp2"], ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)
    exported = [programs.exported(shipped.config, mapping, rank, options) for rank in range(4)]
    ranks = [run_passes(named_pipelines()[PLUGINS], program)[0] for program in exported]
    names = {node.name for program in ranks for node in select(program.model, [1, 3], ["attention"])}
    found = capture(ranks, mapping, shipped.reader, scenario.steps()[0], names)
    assert [(each.rank, each.node.layer) for each in found] == [(0, 1), (2, 3)]
    whole = run_passes(named_pipelines()[PLUGINS], programs.exported(shipped.config, GRID["one-rank"], 0, options))[0]
    names = {node.name for node in select(whole.model, [1, 3], ["attention"])}
    for mine, all_of_it in zip(
        found, capture([whole], GRID["one-rank"], shipped.reader, scenario.steps()[0], names), strict=True
    ):
        query, wanted = mine.feeds["query"], all_of_it.feeds["query"]
        np.testing.assert_allclose(query, wanted[..., : query.shape[-1]], atol=2e-4)
        assert query.shape[-1] == wanted.shape[-1] // 2


@pytest.mark.parametrize("form", ["none", "int4_asymmetric"])
def test_experts_one_at_a_time_are_the_body(
    shipped: Subject,
    fused: Callable[..., Program],
    captured: list[Captured],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    """As a layer of full size is run: the same bits but for the order of sums."""
    program = fused("float16", form)
    (node,) = (op_node(program, each) for each in select(program.model, [LAYER], ["moe"]))
    feeds = {node.inputs[name]: captured[-1].feeds[name] for name in ("x", "router")}
    opener = BodiesOnOnnxRuntime(shipped.reader, 1)
    with opener(node.program, [feeds]) as whole:
        expected = infer(whole, feeds)
    monkeypatch.setattr(expert_by_expert, "LARGE", 1000)
    with opener(node.program, [feeds]) as runner:
        assert isinstance(runner, expert_by_expert.ExpertByExpert)
        got = infer(runner, feeds)
        assert runner.last_inference_time() > 0
    for name, value in expected.items():
        assert (got[name] != value).mean() < 0.01
        np.testing.assert_allclose(got[name], value, rtol=2e-3, atol=1e-4)
