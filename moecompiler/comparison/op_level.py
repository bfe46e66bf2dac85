"""Each node against its own body in float64: two programs of it beside each other, on real inputs and on harder ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import helper

from moecompiler.comparison.capture import Captured
from moecompiler.comparison.cases import cases_of
from moecompiler.comparison.exact import Exact
from moecompiler.comparison.nodes import OpNode, as_the_op_says, family_of, weights_of
from moecompiler.comparison.result import OpCase, OpLevel, OpTime, Ulps
from moecompiler.comparison.runners import OpenProgram, infer
from moecompiler.comparison.thresholds import held
from moecompiler.comparison.ulps import ratio_of_means, summary, ulps
from moecompiler.materializing import Materializer
from moecompiler.validation.place import Arrays
from moecompiler.validation.ties import router_margin
from moecompiler.validation.tolerances import TOLERANCES

_TIMED_RUNS = 5


@dataclass(frozen=True)
class Programs:
    """Two ways to run a node, by name, the one in question first; ``timed``: those whose time says something (not those whose
    kernels are interpreted)."""

    openers: Mapping[str, OpenProgram]
    timed: frozenset[str]


def measure_ops(
    captured: Sequence[Captured],
    lengths: np.ndarray,
    programs: Programs,
    tensors: Callable[[int], Materializer],
    told: Callable[[str], None] = lambda name: None,
) -> OpLevel:
    """``lengths [batch]``: of the prompts that were captured. ``tensors``: by rank, what makes its weights; ``told`` gets the
    name of each node before it is measured. One node's weights are in memory at a time."""
    evaluators: dict[bytes, Exact] = {}
    cases: list[OpCase] = []
    for each in captured:
        told(each.node.name)
        model = as_the_op_says(each.node)
        key = model.SerializeToString(deterministic=True)
        if key not in evaluators:
            evaluators[key] = Exact(model)
        cases += _measure(each, lengths, programs, evaluators[key], tensors(each.rank))
    return OpLevel(tuple(cases), _times(cases, programs.timed))


def _measure(
    captured: Captured, lengths: np.ndarray, programs: Programs, evaluator: Exact, tensors: Materializer
) -> list[OpCase]:
    node, family = captured.node, family_of(captured.node.op)
    weights = weights_of(node, tensors)
    attributes = attributes_of(node)
    present = None
    if "present_key" in node.outputs:
        (whole,) = evaluator(weights, [captured.feeds])
        present = {name: array for name, array in whole.items() if name.startswith("present_")}
    cases = cases_of(
        family,
        captured.feeds,
        node.dtype,
        lengths=lengths,
        top_k=attributes.get("top_k", 0),
        local_experts=weights["expert_ids"].tolist() if "expert_ids" in weights else (),
        present=present,
    )
    exact = dict(zip(cases, evaluator(weights, list(cases.values())), strict=True))
    weights.clear()
    feeds = {case: {node.inputs[name]: array for name, array in arrays.items()} for case, arrays in cases.items()}
    got: dict[str, dict[str, Arrays]] = {}
    times: dict[str, float] = {}
    for name, opener in programs.openers.items():
        with opener(node.program, list(feeds.values())) as runner:
            got[name] = {case: infer(runner, arrays) for case, arrays in feeds.items()}
            if name in programs.timed:
                times[name] = _milliseconds(runner, feeds["real"])
    return [
        compare_output(node, case, output, exact[case][output], {name: got[name][case][tensor] for name in got},
                 cases[case], attributes, times if case == "real" else {})
        for case in cases
        for output, tensor in node.outputs.items()
    ]  # fmt: skip


def _milliseconds(runner: Any, feeds: Arrays) -> float:
    times = []
    for _ in range(_TIMED_RUNS):
        infer(runner, feeds)
        times.append(runner.last_inference_time())
    return 1e3 * float(np.median(times))


def attributes_of(node: OpNode) -> dict[str, Any]:
    """Of the node itself."""
    (own,) = node.program.model.graph.node
    return {each.name: helper.get_attribute_value(each) for each in own.attribute}


def compare_output(
    node: OpNode,
    case: str,
    output: str,
    exact: np.ndarray,
    got: Mapping[str, np.ndarray],
    feeds: Arrays,
    attributes: Mapping[str, Any],
    times: Mapping[str, float],
) -> OpCase:
    """One output of a node: ``got`` by program, the first of two in question, against ``exact``; ``feeds``: by the op's names.
    ``times``: milliseconds by program."""
    dtype = node.types[node.outputs[output]]
    rows, counted = (
        exact.reshape(-1, exact.shape[-1]),
        _counted(case, output, exact, got, feeds, attributes, node.dtype),
    )
    errors: dict[str, np.ndarray] = {}
    figures: dict[str, Ulps] = {}
    for name, array in got.items():
        own = array.reshape(rows.shape)[counted]
        errors[name] = ulps(own, rows[counted], dtype)
        figures[name] = summary(errors[name], own, rows[counted])
    first, second = errors
    ratio, interval = ratio_of_means(errors[first], errors[second])
    return OpCase(
        node.name,
        node.op,
        node.layer,
        node.module,
        output,
        case,
        int(counted.sum()),
        dtype,
        figures,
        ratio,
        interval,
        all(each.passed for each in held(node.op, figures[first], figures[second], interval)),
        dict(times),
        int((~counted).sum()),
    )


def _counted(
    case: str,
    output: str,
    exact: np.ndarray,
    got: Mapping[str, np.ndarray],
    feeds: Arrays,
    attributes: Mapping[str, Any],
    dtype: str,
) -> np.ndarray:
    """Which rows of an output are compared, bool ``[rows]``: of a cache those that have been written, by anyone; of a MoE those
    whose routing is not for rounding to decide."""
    count = exact.size // exact.shape[-1]
    everything = np.ones(count, bool)
    if output.startswith("present_"):
        before = feeds[output.replace("present", "past")].reshape(count, -1)
        sides = [exact, *got.values()]
        written = np.any([(side.reshape(count, -1) != before).any(-1) for side in sides], axis=0)
        return written if written.any() else everything
    if "router" in feeds and case != "ties" and TOLERANCES[dtype].tie:
        logits = feeds["x"].astype(np.float64) @ feeds["router"].astype(np.float64).T
        clear = router_margin(torch.from_numpy(logits), attributes["top_k"]).numpy() > TOLERANCES[dtype].tie
        return clear if clear.any() else everything
    return everything


def _times(cases: Sequence[OpCase], timed: frozenset[str]) -> tuple[OpTime, ...]:
    found: dict[tuple[str, str], dict[str, float]] = {}
    for case in cases:
        for name, value in case.milliseconds.items():
            found.setdefault((name, case.op), {})[case.node] = value
    return tuple(
        OpTime(name, op, len(nodes), sum(nodes.values())) for (name, op), nodes in found.items() if name in timed
    )
