"""Passes and how they are run: program in, program out, and what was done.

A pass sees a private copy of the graph in onnx-graphsurgeon's form and the weights' recipes, changes both in place, and
reports each change with the HF module it happened in. ``apply`` makes that pure: program → (program, result).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from moecompiler.errors import UserError
from moecompiler.graph import DOMAIN, Program
from moecompiler.ops import OpSpec, add_function
from moecompiler.weights import Recipe


@dataclass(frozen=True)
class Change:
    """One rewrite: what was done, to which node, of which HF module."""

    what: str
    node: str
    module: str


@dataclass(frozen=True)
class Missed:
    """An HF module in which a pass should have matched and did not: how many nodes of its pattern did, at its nearest, which
    node was in the way, and why."""

    module: str
    depth: int
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.module} (nearest miss: {self.depth} nodes matched, then at {self.node}: {self.reason})"


class Pass(Protocol):
    """A rewrite. Its class docstring says what it does; ``name`` is what the command line calls it."""

    name: str

    def rewrite(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Change]:
        """Changes ``graph`` and ``weights`` (by initializer name) in place; returns what it did."""


@dataclass(frozen=True)
class PassResult:
    """What one pass did; ``seconds`` is wall time and no part of what a result is."""

    name: str
    changes: tuple[Change, ...]
    nodes_before: int
    nodes_after: int
    seconds: float
    missed: tuple[Missed, ...] = ()

    @property
    def matches(self) -> int:
        return len(self.changes)

    def to_json(self) -> dict[str, Any]:
        """Without the time, so that the same compile writes the same bytes."""
        data = {
            "name": self.name,
            "matches": self.matches,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
        }
        return data | ({"missed": [str(each) for each in self.missed]} if self.missed else {})


def apply(step: Pass, program: Program) -> tuple[Program, PassResult]:
    """Runs one pass on a copy of ``program``; nodes left without a reader and weights left without one are dropped."""
    started = time.perf_counter()
    G_LOGGER.severity = G_LOGGER.ERROR  # it warns at every bfloat16 tensor, which numpy has no dtype for
    graph = gs.import_onnx(program.model)
    before = len(graph.nodes)
    weights = dict(program.weights)
    changes = step.rewrite(graph, weights)
    graph.cleanup(remove_unused_graph_inputs=False)
    graph.nodes = in_stable_order(graph)
    tensors = graph.tensors()
    model = gs.export_onnx(graph)
    model.producer_version = program.model.producer_version
    for spec in _specs(step, graph):
        add_function(model, spec)
    kept = {name: recipe for name, recipe in weights.items() if name in tensors}
    missed = tuple(step.missed(graph, weights)) if hasattr(step, "missed") else ()
    seconds = time.perf_counter() - started
    result = PassResult(step.name, tuple(changes), before, len(graph.nodes), seconds, missed)
    return Program(model, kept), result


def _specs(step: Pass, graph: gs.Graph) -> list[OpSpec]:
    """The ops of the pass that are in the graph, with the bodies that their attributes ask for."""
    specs_for = getattr(step, "spec_of", None)
    if specs_for is None:
        return []
    return [spec for node in graph.nodes if node.domain == DOMAIN and (spec := specs_for(node)) is not None]


def in_stable_order(graph: gs.Graph) -> list[gs.Node]:
    """The nodes so that each comes after what it reads, and otherwise in the order they are in: a graph that a pass leaves
    alone keeps its order, so that two graphs can be compared line by line."""
    position = {id(node): index for index, node in enumerate(graph.nodes)}
    readers: list[list[int]] = [[] for _ in graph.nodes]
    waits = [0] * len(graph.nodes)
    for index, node in enumerate(graph.nodes):
        producers = {position[id(p)] for tensor in node.inputs for p in tensor.inputs if id(p) in position}
        waits[index] = len(producers)
        for producer in producers:
            readers[producer].append(index)
    ready = [index for index, count in enumerate(waits) if count == 0]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(graph.nodes[index])
        for reader in readers[index]:
            waits[reader] -= 1
            if waits[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) != len(graph.nodes):
        raise ValueError("the graph has a cycle")
    return order


def run_passes(
    passes: Sequence[Pass],
    program: Program,
    progress: Callable[[float], None] = lambda fraction: None,
    *,
    allow_missed: bool = False,
) -> tuple[Program, list[PassResult]]:
    """Runs ``passes`` in order; ``progress`` is told the fraction done.

    Raises: UserError where a pass did not match in a module where it should have, unless ``allow_missed``.
    """
    results = []
    for index, step in enumerate(passes):
        program, result = apply(step, program)
        if result.missed and not allow_missed:
            raise UserError(f"{missed_text(result)}; --allow_missed goes on without")
        results.append(result)
        progress((index + 1) / len(passes))
    return program, results


def missed_text(result: PassResult) -> str:
    """One line: how often a pass did not match, and its nearest miss the first time."""
    first, *others = result.missed
    more = f", and {len(others)} more" if others else ""
    return f"pass {result.name}: did not match in {first}{more}"
