"""Fused ops → their bodies: plugins off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_graphsurgeon as gs

from moecompiler.graph import DOMAIN, module_of, node_name
from moecompiler.pipeline import Change
from moecompiler.weights import Recipe


class Restore:
    """Replaces every fused op that has a body in the file by that body, node by node, each named after the op it came from."""

    name = "restore"

    def rewrite(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Change]:
        bodies = {function.name: function for function in graph.functions if function.domain == DOMAIN}
        changes = []
        for node in list(graph.nodes):
            if node.domain == DOMAIN and node.op in bodies:
                inlined = _inline(node, bodies[node.op])
                at = graph.nodes.index(node)
                node.outputs.clear()
                graph.nodes[at : at + 1] = inlined
                changes.append(Change(f"restored {node.op}", node.name, module_of(node.name)))
        graph.functions = [function for function in graph.functions if function.domain != DOMAIN]
        return changes


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
