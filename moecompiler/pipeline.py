"""Passes and how they are run: program in, program out, and what was done.

A pass finds rewrites one after another in a private copy of the graph, in onnx-graphsurgeon's form, and in the weights'
recipes; each is made, or left, before the next is looked for. So every rewrite has a number, and a pipeline can be stopped
before any of them. ``apply`` makes a pass pure: program → (program, result).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from moecompiler.errors import UserError
from moecompiler.graph import DOMAIN, Program
from moecompiler.ops import OpSpec, add_function
from moecompiler.weights import Recipe


@dataclass(frozen=True)
class Rewrite:
    """What a pass has found to do: at which node, of which HF module; ``apply`` does it and says in words what it did."""

    node: str
    module: str
    apply: Callable[[], str]


@dataclass(frozen=True)
class Change:
    """A rewrite that was made; ``number`` counts them from 1 through a pipeline, on one rank."""

    what: str
    node: str
    module: str
    number: int


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
    """A rewriting step. The first paragraph of its class docstring says what it does; ``name`` is what the command line calls it.

    A pass may also have ``spec_of(node)``, the op of a node that it makes (see ``ops``), ``missed(graph, weights)``, where it
    should have matched and did not, ``why_not(graph, weights, node)``, why it leaves a node alone (or None), and in words
    ``needs``, ``must_match`` (how often) and ``guarantees``.
    """

    name: str

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        """The rewrites of ``graph`` and ``weights`` (by initializer name), one after another. Each is applied, which changes
        both in place, or left, before the next is asked for."""


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


def apply(step: Pass, program: Program, *, first: int = 1, limit: int | None = None) -> tuple[Program, PassResult]:
    """Runs one pass on a copy of ``program``; nodes left without a reader and weights left without one are dropped.

    Its rewrites are numbered from ``first`` on; those beyond number ``limit`` are left (and what it did not match then is not
    reported as missed).
    """
    started = time.perf_counter()
    G_LOGGER.severity = G_LOGGER.ERROR  # it warns at every bfloat16 tensor, which numpy has no dtype for
    graph = gs.import_onnx(program.model)
    before = len(graph.nodes)
    weights = dict(program.weights)
    changes, stopped = _make(step, graph, weights, first, limit)
    graph.cleanup(remove_unused_graph_inputs=False)
    graph.nodes = in_stable_order(graph)
    tensors = graph.tensors()
    model = gs.export_onnx(graph)
    model.producer_version = program.model.producer_version
    for spec in _specs(step, graph):
        add_function(model, spec)
    kept = {name: recipe for name, recipe in weights.items() if name in tensors}
    expected = hasattr(step, "missed") and not stopped
    missed = tuple(step.missed(graph, weights)) if expected else ()  # type: ignore[attr-defined]
    seconds = time.perf_counter() - started
    result = PassResult(step.name, tuple(changes), before, len(graph.nodes), seconds, missed)
    return Program(model, kept), result


def _make(
    step: Pass, graph: gs.Graph, weights: dict[str, Recipe], first: int, limit: int | None
) -> tuple[list[Change], bool]:
    """Makes the pass's rewrites up to ``limit``; says whether any was left."""
    changes: list[Change] = []
    for rewrite in step.rewrites(graph, weights):
        number = first + len(changes)
        if limit is not None and number > limit:
            return changes, True
        changes.append(Change(rewrite.apply(), rewrite.node, rewrite.module, number))
    return changes, False


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
    limit: int | None = None,
    watch: Callable[[int, Program, PassResult], None] = lambda index, program, result: None,
) -> tuple[Program, list[PassResult]]:
    """Runs ``passes`` in order; ``progress`` is told the fraction done, ``watch`` each pass's index, program and result.

    Rewrites are numbered from 1 through all passes; those beyond number ``limit`` are not made.
    Raises: UserError where a pass did not match in a module where it should have, unless ``allow_missed`` or ``limit``.
    """
    results: list[PassResult] = []
    made = 0
    for index, step in enumerate(passes):
        program, result = apply(step, program, first=made + 1, limit=limit)
        if result.missed and not allow_missed and limit is None:
            raise UserError(f"{missed_text(result)}; --allow_missed goes on without")
        made += result.matches
        results.append(result)
        watch(index, program, result)
        progress((index + 1) / len(passes))
    return program, results


def missed_text(result: PassResult) -> str:
    """One line: how often a pass did not match, and its nearest miss the first time."""
    first, *others = result.missed
    more = f", and {len(others)} more" if others else ""
    return f"pass {result.name}: did not match in {first}{more}"
