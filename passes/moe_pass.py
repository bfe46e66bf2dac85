"""What the passes that swap MoE blocks for ``moecompiler::MoE`` share: the blocks differ in how they compute their experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.config import NormalizationMode
from moecompiler.graph import module_of, node_name, weight_tensor
from moecompiler.ops import OpSpec
from moecompiler.passes.dtypes import written_like
from moecompiler.passes.pattern import Match, Pattern, escaping
from moecompiler.passes.pattern_pass import PatternPass
from moecompiler.passes.rewiring import position_of
from moecompiler.passes.routing_patterns import Route, routing_of
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.weights import Recipe

Kind = Literal["dense", "batched", "eager", "grouped"]


@dataclass(frozen=True)
class Experts:
    """The experts of a block as found: ``match`` binds ``x [tokens, hidden]`` and the weights ``gate_up`` and ``down``;
    ``pairs`` says which tensors a way of routing has to make; ``expert_ids`` is None where all experts are there;
    ``transposed`` names the weights that are stored ``[experts, in, out]``."""

    match: Match
    pairs: Callable[[Route], Sequence[tuple[Pattern, gs.Tensor]]]
    expert_ids: gs.Tensor | None = None
    transposed: frozenset[str] = frozenset()


def kind_of(nodes: Sequence[gs.Node]) -> Kind:
    """How the block with these nodes computes its experts: all of them for every token; as many products as there are choices,
    each with the chosen expert's weights (``batched_mm``); one expert after another, each for the tokens that chose it, found by
    search (``eager``) or by sorting (``grouped_mm``)."""
    ops = {node.op for node in nodes}
    if "NonZero" in ops:
        return "eager"
    if "CumSum" in ops:
        return "grouped"
    gathers = (node for node in nodes if node.op in ("Gather", "GatherND"))
    return "batched" if any(len(node.inputs[0].shape or ()) == 3 for node in gathers) else "dense"


class MoEPass(PatternPass):
    """A pass that finds the experts of its ``kind``; the routing before them, and the op, are the same for all."""

    kind: ClassVar[Kind]
    modules = r"(.+\.)?experts"
    op_names = ("MoE",)
    needs = "constant-folding and clean-up"
    guarantees = "router, experts and weighted sum are one op that takes the weights whole, by reference"

    def experts_of(self, found: Match) -> Experts | str:
        """The experts that ``found`` ends, or why they are none."""
        raise TypeError(f"{type(self).__name__} has no experts_of")

    def expects(self, nodes: Sequence[gs.Node]) -> bool:
        return kind_of(nodes) == self.kind

    def spec_of(self, node: gs.Node) -> OpSpec | None:
        """The op with the body for a node's way of routing."""
        if node.op != "MoE":
            return None
        return moe_spec(NormalizationMode(node.attrs["normalization_mode"]), node.attrs["top_k"])

    def check(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str | None:
        experts = self.experts_of(found)
        if isinstance(experts, str):
            return experts
        tensors = experts.match.tensors
        for name in ("gate_up", "down"):
            if tensors[name].name not in weights:
                return f"the experts' matrices {tensors[name].name} are not weights that can be moved by reference"
        if len(tensors["x"].shape or ()) != 2:
            return f"the experts read {tensors['x'].name} of shape {tensors['x'].shape}, not [tokens, hidden]"
        routing = routing_of(tensors["x"], experts.pairs)
        if isinstance(routing, str):
            return routing
        whole = Match(tensors, experts.match.named, (*experts.match.nodes, *routing.match.nodes))
        return escaping(whole, graph, kept=(found.nodes[0].outputs[0],))

    def replace(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str:
        experts = self.experts_of(found)
        assert not isinstance(experts, str)
        tensors = experts.match.tensors
        routing = routing_of(tensors["x"], experts.pairs)
        assert not isinstance(routing, str)
        last = _with_cast(found.nodes[0])
        (y,) = last.outputs
        last.outputs.clear()
        name = node_name(module_of(last.name).removesuffix(".experts"), f"MoE_{last.name.rpartition('_')[2]}")
        orient = partial(_oriented, graph=graph, weights=weights, node=name)
        inputs = [
            tensors["x"],
            orient(routing.match.tensors["router"], (1, 0), routing.router_is_transposed),
            orient(tensors["gate_up"], (0, 2, 1), "gate_up" in experts.transposed),
            orient(tensors["down"], (0, 2, 1), "down" in experts.transposed),
            experts.expert_ids or _all_experts(tensors["down"], name),
        ]
        attributes = {"top_k": routing.top_k, "normalization_mode": int(routing.mode)}
        written = written_like(y, tensors["x"], graph, name)
        spec = moe_spec(routing.mode, routing.top_k)
        graph.nodes.insert(position_of(last, graph), spec.node(name, inputs, [written], attributes))
        return f"fused {len(experts.match.nodes) + len(routing.match.nodes)} nodes into MoE"


def _with_cast(last: gs.Node) -> gs.Node:
    """The cast back from float32 after the sum, where there is one: the op's output has its input's type."""
    readers = last.outputs[0].outputs
    return readers[0] if len(readers) == 1 and readers[0].op == "Cast" else last


def _all_experts(weight: gs.Tensor, name: str) -> gs.Constant:
    return gs.Constant(f"{name}_expert_ids", np.arange(weight.shape[0], dtype=np.int64))


def _oriented(
    tensor: gs.Tensor,
    perm: tuple[int, ...],
    transposed: bool,
    graph: gs.Graph,
    weights: dict[str, Recipe],
    node: str,
) -> gs.Tensor:
    """The weight as the op ``node`` takes it, rows by output: a transposed one is turned back by reference."""
    if not transposed:
        return tensor
    if tensor.name not in weights:  # small enough to be held in the graph
        turned = gs.Variable(f"{node}_{tensor.name}.T", tensor.dtype, [tensor.shape[axis] for axis in perm])
        transpose = node_name(module_of(node), f"Transpose_{node.rpartition('_')[2]}")
        graph.nodes.append(gs.Node("Transpose", transpose, {"perm": list(perm)}, [tensor], [turned]))
        return turned
    name = tensor.name.removesuffix(".T") if tensor.name.endswith(".T") else f"{tensor.name}.T"
    if name not in weights:
        weights[name] = weights[tensor.name].transposed(perm)
    known = graph.tensors()
    if name in known:
        return known[name]
    return gs.Constant(name, LazyValues(weight_tensor(name, weights[name])))
