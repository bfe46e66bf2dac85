"""Graphs that nobody here wrote: Hugging Face's own models, exported by torch, through the whole pipeline of fused ops."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from hf_exports import EXAMPLE, EXPERTS, SHAPES, Kind, export, exported, exported_logits, hf_logits, logits

from moecompiler.config import NormalizationMode
from moecompiler.graph import DOMAIN, Program, check, module_of
from moecompiler.passes.pipelines import PLUGINS, named_pipelines
from moecompiler.pipeline import run_passes

pytestmark = pytest.mark.xdist_group("foreign")

MIXTRAL = Kind("mixtral")
LLAMA = Kind("llama", dtype="bfloat16")
QWEN2 = Kind("qwen2", attention="eager", dtype="float16")
EAGER = Kind("mixtral", experts="eager", attention="eager", exporter="traced")
TRACED16 = Kind("mixtral", experts="eager", dtype="float16", exporter="traced", opset=18)
GROUPED = Kind("mixtral", experts="grouped_mm", exporter="transformers")
# the tracing exporter takes a fraction of a second, the other three or four: each combination comes at least once
KINDS = (
    MIXTRAL,
    Kind("mixtral", attention="eager", dtype="float16", exporter="traced"),
    LLAMA,
    QWEN2,
    EAGER,
    TRACED16,
    Kind("mixtral", attention="eager", dtype="bfloat16", exporter="traced", opset=20),
    Kind("mixtral", layers=2, exporter="traced"),
    Kind("llama", attention="eager", dtype="float16", exporter="traced"),
    Kind("qwen2", dtype="float16", exporter="traced"),
    GROUPED,
)
# bfloat16 is run in float32 over the same weights; in float16, torch rounds where the op does not
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-5, "float16": 2e-2}
HF_TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-1, "float16": 4e-2}


def fused(kind: Kind) -> Program:
    program, results = run_passes(named_pipelines()[PLUGINS], exported(kind).program)
    assert not any(result.missed for result in results)
    return program


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_that_should_fuse_does_and_computes_the_same(kind: Kind) -> None:
    foreign = exported(kind)
    program = fused(kind)
    check(program)
    ops = Counter(node.op_type for node in program.model.graph.node if node.domain == DOMAIN)
    moe = {"MoE": kind.layers} if kind.model == "mixtral" else {}
    assert ops == {"RMSNorm": 1, "AddRMSNorm": 2 * kind.layers, "ContextAttention": kind.layers, **moe}
    for shape in SHAPES:
        after = logits(program, foreign.reader, shape)
        hf = hf_logits(foreign.module, shape)
        assert np.abs(hf).max() > 1
        np.testing.assert_allclose(after, hf, atol=HF_TOLERANCES[kind.dtype], rtol=0)
        if kind.experts == "eager" and shape == (1, 1):
            continue  # a traced loop over all experts does not run where one token hits two; the op does
        np.testing.assert_allclose(after, exported_logits(kind, shape), atol=TOLERANCES[kind.dtype], rtol=0)


def test_a_traced_loop_over_experts_runs_only_where_as_many_are_hit() -> None:
    foreign = exported(EAGER)
    with pytest.raises(Exception, match="Split"):
        logits(foreign.program, foreign.reader, (1, 1))


def test_torch_cannot_export_a_loop_over_the_experts_hit(tmp_path: Path) -> None:
    """Why ``eager`` experts are traced here. When this fails, torch has learnt it, and that export belongs among the others."""
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="Could not guard on data-dependent expression"):
        export(Kind("mixtral", experts="eager"), tmp_path / "model.onnx")


@pytest.mark.parametrize("kind", [MIXTRAL, EAGER], ids=str)
def test_the_moe_op_takes_the_weights_as_they_are_stored(kind: Kind) -> None:
    program = fused(kind)
    for layer, node in enumerate(node for node in program.model.graph.node if node.op_type == "MoE"):
        assert module_of(node.name) == f"model.model.layers.{layer}.mlp"
        attributes = {each.name: each.i for each in node.attribute}
        assert attributes == {"top_k": 2, "normalization_mode": int(NormalizationMode.RENORMALIZE)}
        _, _, gate_up, down, expert_ids = node.input
        assert program.weights[gate_up] == exported(kind).program.weights[gate_up]
        assert program.weights[gate_up].shape == (EXPERTS, 192, 64)
        assert program.weights[down].shape == (EXPERTS, 64, 96)
        ids = next(each for each in program.model.graph.initializer if each.name == expert_ids)
        assert list(np.frombuffer(ids.raw_data, np.int64)) == list(range(EXPERTS))


@pytest.mark.parametrize(
    "kind", [Kind("mixtral", exporter="traced"), Kind("llama", attention="eager", dtype="float16", exporter="traced")]
)
def test_padding_on_the_left_stays_what_it_is(kind: Kind) -> None:
    """Its queries see nothing: sdpa gives them 0, eager attention the mean of all."""
    foreign = exported(kind)
    before, after = (logits(each, foreign.reader, (2, 7), hidden=3) for each in (foreign.program, fused(kind)))
    assert np.isfinite(before).all()
    np.testing.assert_allclose(after, before, atol=TOLERANCES[kind.dtype], rtol=0)


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_a_graph_of_fixed_sizes_fuses_too(experts: str) -> None:
    foreign = exported(Kind("mixtral", experts=experts, attention="eager", exporter="traced", fixed=True))
    program, results = run_passes(named_pipelines()[PLUGINS], foreign.program)
    assert not any(result.missed for result in results)
    before, after = (logits(each, foreign.reader, EXAMPLE) for each in (foreign.program, program))
    np.testing.assert_allclose(after, before, atol=2e-5, rtol=0)


def test_twice_changes_nothing_more() -> None:
    once = fused(MIXTRAL)
    twice, results = run_passes(named_pipelines()[PLUGINS], once)
    assert {result.name: result.matches for result in results if result.matches} == {}
    assert twice.model.SerializeToString(deterministic=True) == once.model.SerializeToString(deterministic=True)


Change = Callable[[list[gs.Node]], None]


def _first(nodes: list[gs.Node], op: str) -> gs.Node:
    return next(node for node in nodes if node.op == op)


def _attribute(op: str, name: str, value: object) -> Change:
    return lambda nodes: _first(nodes, op).attrs.update({name: value})


def _as_op(op: str, other: str) -> Change:
    return lambda nodes: setattr(_first(nodes, op), "op", other)


def _constant(op: str, which: int, value: object) -> Change:
    def change(nodes: list[gs.Node]) -> None:
        node = _first(nodes, op)
        node.inputs[which] = gs.Constant(
            f"changed_{which}", np.array(value, np.asarray(node.inputs[which].values).dtype)
        )

    return change


def _first_input_gone(op: str) -> Change:
    def change(nodes: list[gs.Node]) -> None:
        _first(nodes, op).inputs.pop(0)

    return change


def _gate_and_up_swapped(nodes: list[gs.Node]) -> None:
    split = _first(nodes, "Sigmoid").inputs[0].inputs[0]
    split.outputs = list(reversed(split.outputs))


def _heads_as_a_whole(nodes: list[gs.Node]) -> None:
    """Heads repeated 0 1 0 1 instead of 0 0 1 1."""
    node = _first(nodes, "Expand")
    node.inputs[0].shape[1], node.inputs[0].shape[2] = node.inputs[0].shape[2], node.inputs[0].shape[1]


TIDY = 5  # passes of the pipeline before it fuses
ATTENTION = "model.model.layers.0.self_attn"
EXPERTS_0 = "model.model.layers.0.mlp"
GROUPED_0 = "model.layers.0.mlp.experts"
NEAR_MISSES = {
    "softmax over queries": (
        LLAMA,
        ATTENTION,
        _attribute("Softmax", "axis", 2),
        "Softmax_.*works along axis 2, not -1",
    ),
    "heads repeated as a whole": (LLAMA, ATTENTION, _heads_as_a_whole, "repeats along another axis"),
    "another function than softmax": (LLAMA, ATTENTION, _as_op("Softmax", "LogSoftmax"), "LogSoftmax where Softmax"),
    "a half of the head too small": (LLAMA, ATTENTION, _constant("Slice", 2, [3]), r"takes \[0:3\] of axis 3"),
    "scores rounded to whole numbers": (
        TRACED16,
        ATTENTION,
        _attribute("Cast", "to", 7),
        "casts to INT64, not to a float",
    ),
    "halves of the other sign": (LLAMA, ATTENTION, _as_op("Neg", "Abs"), "Abs where Neg was expected|Mul was expected"),
    "weights not divided by their sum": (
        MIXTRAL,
        EXPERTS_0,
        _as_op("Div", "Mul"),
        "routing is none of those known.*Mul",
    ),
    "divided by the largest": (MIXTRAL, EXPERTS_0, _as_op("ReduceSum", "ReduceMax"), "ReduceMax where ReduceSum"),
    "the smallest chosen": (MIXTRAL, EXPERTS_0, _attribute("TopK", "largest", 0), "TopK_.*largest is 0"),
    "a router that is scaled": (MIXTRAL, EXPERTS_0, _attribute("Gemm", "alpha", 0.5), "Gemm_.*alpha"),
    "experts cut off": (
        MIXTRAL,
        EXPERTS_0,
        _constant("Clip", 2, EXPERTS - 2),
        "Clip_.* changes numbers of the 4 experts",
    ),
    "gate and up swapped": (MIXTRAL, EXPERTS_0, _gate_and_up_swapped, "is not output 0 of Split"),
    "up through the sigmoid": (MIXTRAL, EXPERTS_0, _as_op("Sigmoid", "Tanh"), "Tanh where Sigmoid was expected"),
    "an expert's weights of another axis": (
        EAGER,
        EXPERTS_0,
        _attribute("OneHot", "axis", 1),
        "OneHot.*axis is 1, not -1",
    ),
    "added over what is there": (EAGER, EXPERTS_0, _attribute("ScatterElements", "axis", 1), "axis is 1, not 0"),
    "gate from the second half": (EAGER, EXPERTS_0, _constant("Slice", 1, [96]), r"gate is \[96:"),
    "one expert unlike the others": (EAGER, EXPERTS_0, _as_op("Sigmoid", "Tanh"), "3 steps before.*Tanh where Sigmoid"),
    "choices and tokens mixed up": (
        EAGER,
        EXPERTS_0,
        _attribute("Transpose", "perm", [2, 0, 1]),
        r"perm is \[2, 0, 1\]",
    ),
    "choices sorted the other way": (GROUPED, GROUPED_0, _attribute("TopK", "largest", 1), "largest is 1, not 0"),
    "pieces without their ends": (GROUPED, GROUPED_0, _attribute("CumSum", "exclusive", 1), "exclusive is 1, not 0"),
    "counted in other bins": (GROUPED, GROUPED_0, _constant("Clip", 2, EXPERTS - 2), "does not count the choices"),
    "an expert left out": (
        GROUPED,
        GROUPED_0,
        _first_input_gone("Concat"),
        "joins the pieces of 3 experts|piece of expert 0",
    ),
    "a rest of another number": (GROUPED, GROUPED_0, _constant("Mod", 1, 3), "what sorts the choices"),
    "an expert found in another way": (EAGER, EXPERTS_0, _as_op("Greater", "Less"), "step 1, at .*Less where Greater"),
}


@functools.cache
def tidied(kind: Kind) -> Program:
    return run_passes(named_pipelines()[PLUGINS][:TIDY], exported(kind).program)[0]


FUSE = named_pipelines()[PLUGINS][TIDY:]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_almost_one_stays_and_says_why(name: str) -> None:
    kind, module, change, reason = NEAR_MISSES[name]
    graph = gs.import_onnx(tidied(kind).model)
    change([node for node in graph.nodes if node.name.startswith(module)])
    broken = Program(gs.export_onnx(graph, do_type_check=False), tidied(kind).weights)
    program, results = run_passes(FUSE, broken, allow_missed=True)
    (missed,) = [missed for result in results for missed in result.missed]
    assert missed.module.startswith(module)
    assert re.search(reason, f"{missed.node}: {missed.reason}"), str(missed)
    ops = {node.op_type for node in program.model.graph.node if node.domain == DOMAIN}
    assert {"ContextAttention", "MoE"} - ops == {"ContextAttention" if module.endswith("self_attn") else "MoE"} | (
        {"MoE"} if kind.model != "mixtral" else set()
    )


@pytest.mark.parametrize(("op", "module"), [("Softmax", ATTENTION), ("Sigmoid", EXPERTS_0)])
def test_what_something_else_reads_is_not_swallowed(op: str, module: str) -> None:
    graph = gs.import_onnx(tidied(MIXTRAL).model)
    inner = next(node for node in graph.nodes if node.op == op and node.name.startswith(module)).outputs[0]
    graph.outputs.append(inner)
    tapped = Program(gs.export_onnx(graph, do_type_check=False), tidied(MIXTRAL).weights)
    _, results = run_passes(FUSE, tapped, allow_missed=True)
    (missed,) = [missed for result in results for missed in result.missed]
    assert missed.reason == f"{inner.name}, inside it, is an output of the graph"
