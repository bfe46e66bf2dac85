"""Fused ops → their bodies: plugins off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import onnx_graphsurgeon as gs

from moecompiler.graph import DOMAIN, module_of, node_name
from moecompiler.passes.rewiring import position_of
from moecompiler.pipeline import Rewrite
from moecompiler.weights import Recipe


class Restore:
    """Replaces every fused op that has a body in the file by that body, node by node, each named after the op it came from."""

    name = "restore"
    needs = "the ops' bodies in the file, as fusing passes put them there"
    must_match = "never: a graph may have no fused ops"
    guarantees = "no fused op is left that has a body in the file"

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        bodies = {function.name: function for function in graph.functions if function.domain == DOMAIN}
        for node in list(graph.nodes):
            if node.domain == DOMAIN and node.op in bodies:
                yield Rewrite(node.name, module_of(node.name), partial(_restore, graph, node, bodies[node.op]))
        left = {node.op for node in graph.nodes if node.domain == DOMAIN}
        graph.functions = [each for each in graph.functions if each.domain != DOMAIN or each.name in left]

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str:
        """Why a node stays."""
        fused = node.domain == DOMAIN
        return f"{node.op} has no body in the file" if fused else f"{node.op} is a standard operator already"


def _restore(graph: gs.Graph, node: gs.Node, body: gs.Function) -> str:
    inlined = _inline(node, body)
    at = position_of(node, graph)
    node.outputs.clear()
    graph.nodes[at : at + 1] = inlined
    return f"restored {node.op}"


def _inline(node: gs.Node, body: gs.Function) -> list[gs.Node]:
    """The body's nodes over the node's own inputs and outputs, its attributes filled in."""
    tensors: dict[str, gs.Tensor] = {}
    for formal, actual in zip((*body.inputs, *body.outputs), (*node.inputs, *node.outputs), strict=True):
        tensors[formal.name] = actual

    def tensor(formal: gs.Tensor) -> gs.Tensor:
        if formal.is_empty() or isinstance(formal, gs.Constant):
            return formal
        return tensors.setdefault(formal.name, gs.Variable(f"{node.name}/{formal.name}"))

    stem = node.name.rpartition("/")[2]
    return [
        gs.Node(
            inner.op,
            node_name(module_of(node.name), f"{stem}.{index}.{inner.op}"),
            {name: _filled(value, node.attrs) for name, value in inner.attrs.items()},
            [tensor(each) for each in inner.inputs],
            [tensor(each) for each in inner.outputs],
            inner.domain,
        )
        for index, inner in enumerate(body.nodes)
    ]


def _filled(value: Any, attributes: Mapping[str, Any]) -> Any:
    """An attribute of a body's node; a reference to one of the op's attributes becomes its value."""
    if isinstance(value, gs.Node.AttributeRef):
        return attributes[value.name]
    return value
