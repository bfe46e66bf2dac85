"""A pass made of a pattern, a check and a rewrite."""

from __future__ import annotations

from typing import ClassVar

import onnx_graphsurgeon as gs

from moecompiler.graph import module_of
from moecompiler.ops import OpSpec
from moecompiler.passes.pattern import Match, Miss, Op, match
from moecompiler.pipeline import Change
from moecompiler.weights import Recipe


class PatternPass:
    """Tries ``pattern`` at every node, from the start of the graph to its end.

    ``check`` says why a match is not one after all, or None; ``replace`` rewrites it. ``expected`` says how often the pass
    must match in a graph, or None where any number will do. ``nearest_miss`` is what an error tells.
    """

    name: ClassVar[str]
    pattern: ClassVar[Op]
    ops: ClassVar[tuple[OpSpec, ...]] = ()

    def spec_of(self, node: gs.Node) -> OpSpec | None:
        """The op of a node that this pass makes, with its body; None for nodes it does not make."""
        return next((spec for spec in self.ops if spec.name == node.op), None)

    def check(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str | None:
        raise TypeError(f"{type(self).__name__} has no check")

    def replace(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str:
        """Rewrites a match; returns what was done, in words."""
        raise TypeError(f"{type(self).__name__} has no replace")

    def rewrite(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Change]:
        changes = []
        for node in list(graph.nodes):
            found = match(self.pattern, node, Miss())
            if found is None or self.check(found, graph, weights) is not None:
                continue
            changes.append(Change(self.replace(found, graph, weights), node.name, module_of(node.name)))
        return changes

    def nearest_miss(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Miss:
        """The node where the pattern came deepest without matching; a match that failed its check came deepest of all."""
        nearest = Miss()
        for node in graph.nodes:
            miss = Miss()
            found = match(self.pattern, node, miss)
            if found is not None:
                reason = self.check(found, graph, weights)
                if reason is None:
                    continue
                miss = Miss(len(found.nodes), found.nodes[0], reason)
            if miss.depth > nearest.depth:
                nearest = miss
        return nearest
