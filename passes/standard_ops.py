"""Fused ops → operators of ONNX itself, for backends that have kernels for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import onnx_graphsurgeon as gs

from moecompiler.graph import DOMAIN, module_of
from moecompiler.passes.standard_attention import (
    attention_obstacle,
    context_attention_obstacle,
    replace_attention,
    replace_context_attention,
)
from moecompiler.passes.standard_nodes import Replacement, shared_values
from moecompiler.passes.standard_opset import raise_opset, wrong_opset
from moecompiler.pipeline import Missed, Rewrite
from moecompiler.weights import Recipe


@dataclass(frozen=True)
class _Mapping:
    obstacle: Callable[[gs.Node], str | None]
    replace: Callable[[gs.Graph, gs.Node, dict[str, gs.Tensor]], str]


class StandardOps:
    """Replaces fused norms and attention by ONNX's ``RMSNormalization``, ``RotaryEmbedding``, ``TensorScatter`` and
    ``Attention``, and raises the graph to opset 24, which has them.

    MoE stays: ONNX has no operator for it. Nodes that cannot be mapped stay too, and are reported as missed.
    """

    name = "standard-ops"
    needs = "positions of a sequence's tokens that are consecutive within a step, as a session feeds them"
    must_match = "once per norm and attention that is an op"
    guarantees = "a graph of opset 24 in which no norm or attention is an op of ours"

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        shared = shared_values(graph)
        for node in list(graph.nodes):
            if self.why_not(graph, weights, node) is None:
                yield Rewrite(node.name, module_of(node.name), partial(_replace, graph, node, shared))
        left = {node.op for node in graph.nodes if node.domain == DOMAIN}
        graph.functions = [each for each in graph.functions if each.domain != DOMAIN or each.name in left]

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str | None:
        """Why a node stays; None where it does not."""
        mapping = _mappings().get(node.op) if node.domain == DOMAIN else None
        if mapping is None:
            return f"{node.op} is no fused norm or attention"
        return wrong_opset(graph) or mapping.obstacle(node)

    def missed(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Missed]:
        """The fused norms and attentions that are left."""
        found = []
        for node in graph.nodes:
            if node.domain == DOMAIN and node.op in _mappings():
                reason = self.why_not(graph, weights, node)
                found.append(Missed(module_of(node.name), 1, node.name, reason or "it was not looked at"))
        return found


def _replace(graph: gs.Graph, node: gs.Node, shared: dict[str, gs.Tensor]) -> str:
    raise_opset(graph)
    return _mappings()[node.op].replace(graph, node, shared)


def _mappings() -> Mapping[str, _Mapping]:
    return {
        "RMSNorm": _Mapping(lambda node: None, _replace_norm),
        "AddRMSNorm": _Mapping(lambda node: None, _replace_add_and_norm),
        "Attention": _Mapping(attention_obstacle, replace_attention),
        "ContextAttention": _Mapping(context_attention_obstacle, replace_context_attention),
    }


def _replace_norm(graph: gs.Graph, node: gs.Node, shared: dict[str, gs.Tensor]) -> str:
    made, inputs, outputs = Replacement(node, shared), list(node.inputs), list(node.outputs)
    node.outputs.clear()
    _normalize(made, inputs, outputs)
    made.put(graph)
    return "mapped RMSNorm to RMSNormalization"


def _replace_add_and_norm(graph: gs.Graph, node: gs.Node, shared: dict[str, gs.Tensor]) -> str:
    residual, branch, weight = node.inputs
    y, x = node.outputs
    made = Replacement(node, shared)
    node.outputs.clear()
    made.add("Add", [residual, branch], [x])
    _normalize(made, [x, weight], [y])
    made.put(graph)
    return "mapped AddRMSNorm to Add and RMSNormalization"


def _normalize(made: Replacement, inputs: list[gs.Tensor], outputs: list[gs.Tensor]) -> None:
    """In float32 (``stash_type`` 1), over the last axis."""
    attributes = {"axis": -1, "epsilon": float(made.node.attrs["epsilon"]), "stash_type": 1}
    made.add("RMSNormalization", inputs, outputs, attributes)
