"""A pass made of a pattern, a check and a rewrite, which says where it should have matched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import ClassVar

import onnx_graphsurgeon as gs

from moecompiler.graph import DOMAIN, enclosing_modules, module_of
from moecompiler.ops import OpSpec
from moecompiler.passes.pattern import Match, Miss, Op, match
from moecompiler.pipeline import Missed, Rewrite
from moecompiler.weights import Recipe


class PatternPass:
    """Tries ``pattern`` at every node, from the start of the graph to its end.

    ``check`` says why a match is not one after all, or None; ``replace`` rewrites it. ``modules`` is a regular expression for
    the HF modules in each of which one of ``op_names`` must stand afterwards; a graph that does not say where its nodes come
    from is expected to match nowhere in particular. ``expects`` may say of such a module that it is of another kind.
    """

    name: str
    pattern: ClassVar[Op]
    modules: ClassVar[str] = r"(?!)"  # in none in particular
    op_names: ClassVar[tuple[str, ...]] = ()
    ops: ClassVar[tuple[OpSpec, ...]] = ()

    def spec_of(self, node: gs.Node) -> OpSpec | None:
        """The op of a node that this pass makes, with its body; None for nodes it does not make."""
        return next((spec for spec in self.ops if spec.name == node.op), None)

    def check(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str | None:
        raise TypeError(f"{type(self).__name__} has no check")

    def replace(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str:
        """Rewrites a match; returns what was done, in words."""
        raise TypeError(f"{type(self).__name__} has no replace")

    def expects(self, nodes: Sequence[gs.Node]) -> bool:
        """Whether this pass, and no other of those that look at such a module, should match in the one with these nodes."""
        return True

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        for node in list(graph.nodes):
            found = match(self.pattern, node, Miss())
            if found is not None and self.check(found, graph, weights) is None:
                yield Rewrite(node.name, module_of(node.name), partial(self.replace, found, graph, weights))

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str:
        """Why no match ends in a node."""
        miss = self.nearest_miss(graph, weights, (node,))
        if miss.depth <= 0:
            return f"{node.op} is not the last node of its pattern, {self.pattern.op}"
        at = miss.node.name if miss.node is not None else node.name
        return f"{miss.depth} nodes matched, then at {at}: {miss.reason}"

    def missed(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Missed]:
        """The modules in which the pass should have matched and did not, each with its nearest miss."""
        members: dict[str, list[gs.Node]] = {}
        for node in graph.nodes:
            for module in enclosing_modules(module_of(node.name)):
                if re.fullmatch(self.modules, module):
                    members.setdefault(module, []).append(node)
        result = []
        for module, nodes in members.items():
            done = any(node.domain == DOMAIN and node.op in self.op_names for node in nodes)
            if not done and self.expects(nodes):
                miss = self.nearest_miss(graph, weights, nodes)
                where = miss.node.name if miss.node is not None else module
                result.append(Missed(module, max(0, miss.depth), where, miss.reason))
        return result

    def nearest_miss(self, graph: gs.Graph, weights: dict[str, Recipe], nodes: Iterable[gs.Node] | None = None) -> Miss:
        """Where, among ``nodes`` (all), the pattern came deepest without matching; a match that failed its check came deepest of
        all."""
        nearest = Miss()
        for node in graph.nodes if nodes is None else nodes:
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
