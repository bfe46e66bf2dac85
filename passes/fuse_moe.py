"""Router, experts on all tokens and their weighted sum → ``moecompiler::MoE``."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.config import NormalizationMode
from moecompiler.graph import module_of, node_name, weight_tensor
from moecompiler.ops import OpSpec
from moecompiler.passes.moe_patterns import EXPERTS, halves_differ
from moecompiler.passes.pattern import Match, escaping
from moecompiler.passes.pattern_pass import PatternPass
from moecompiler.passes.routing_patterns import routing_of
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.weights import Recipe


class FuseMoE(PatternPass):
    """Swaps each MoE block, from its router's product to the sum over experts, for one op that takes the weights whole."""

    name = "fuse-moe"
    modules = r"(.+\.)?experts"
    op_names = ("MoE",)
    pattern = EXPERTS

    def check(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str | None:
        routing = routing_of(found)
        if isinstance(routing, str):
            return routing
        for name in ("gate_up", "down"):
            if found.tensors[name].name not in weights:
                return (
                    f"the experts' matrices {found.tensors[name].name} are not weights that can be moved by reference"
                )
        whole = Match(found.tensors, found.named, (*found.nodes, *routing.match.nodes))
        return halves_differ(found) or escaping(whole, graph, kept=(found.nodes[0].outputs[0],))

    def replace(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str:
        routing = routing_of(found)
        assert not isinstance(routing, str)
        last = _with_cast(found.nodes[0])
        (y,) = last.outputs
        last.outputs.clear()
        tensors = {**found.tensors, **routing.match.tensors}
        spec = moe_spec(routing.mode, routing.top_k)
        inputs = [
            tensors["x"],
            _oriented(tensors["router"], (1, 0), routing.router_is_transposed, graph, weights),
            _oriented(tensors["gate_up"], (0, 2, 1), "gate_up_transpose" not in found.named, graph, weights),
            _oriented(tensors["down"], (0, 2, 1), "down_transpose" not in found.named, graph, weights),
            tensors["expert_ids"],
        ]
        name = node_name(module_of(last.name).removesuffix(".experts"), f"MoE_{last.name.rpartition('_')[2]}")
        attributes = {"top_k": routing.top_k, "normalization_mode": int(routing.mode)}
        graph.nodes.insert(graph.nodes.index(last), spec.node(name, inputs, [y], attributes))
        return f"fused {len(found.nodes) + len(routing.match.nodes)} nodes into MoE"

    def spec_of(self, node: gs.Node) -> OpSpec | None:
        """The op with the body for a node's way of routing."""
        if node.op != "MoE":
            return None
        return moe_spec(NormalizationMode(node.attrs["normalization_mode"]), node.attrs["top_k"])


def _with_cast(last: gs.Node) -> gs.Node:
    """The cast back from float32 after the sum, where there is one: the op's output has its input's type."""
    readers = last.outputs[0].outputs
    return readers[0] if len(readers) == 1 and readers[0].op == "Cast" else last


def _oriented(
    tensor: gs.Tensor, perm: tuple[int, ...], transposed: bool, graph: gs.Graph, weights: dict[str, Recipe]
) -> gs.Tensor:
    """The weight as the op takes it, rows by output: a transposed one is turned back by reference."""
    if not transposed:
        return tensor
    name = tensor.name.removesuffix(".T") if tensor.name.endswith(".T") else f"{tensor.name}.T"
    if name not in weights:
        weights[name] = weights[tensor.name].transposed(perm)
    known = graph.tensors()
    if name in known:
        return known[name]
    return gs.Constant(name, LazyValues(weight_tensor(name, weights[name])))
