"""A row-parallel branch's all-reduce and the residual addition and RMS norm after it → ``moecompiler::AllReduceAddRMSNorm``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import onnx_graphsurgeon as gs

from moecompiler.graph import DOMAIN, module_of
from moecompiler.ops import OpSpec
from moecompiler.passes.pattern import producer_of
from moecompiler.passes.rewiring import is_any_of, position_of
from moecompiler.pipeline import Rewrite
from moecompiler.plugins.rmsnorm.op import ALL_REDUCE_ADD_RMS_NORM
from moecompiler.weights import Recipe


class FuseAllReduceRMSNorm:
    """Fuses each AddRMSNorm with the all-reduce of its branch, a reshape between them (of experts' tokens) going before it. What
    the branch adds up to is then no tensor of the graph any more."""

    name = "fuse-all-reduce-rms-norm"
    needs = "fuse-add-rms-norm"
    must_match = "never: a graph may be of one rank"
    guarantees = "no AddRMSNorm is left of which the branch is all that reads an all-reduce"

    def spec_of(self, node: gs.Node) -> OpSpec | None:
        return ALL_REDUCE_ADD_RMS_NORM if node.op == ALL_REDUCE_ADD_RMS_NORM.name else None

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        for norm in list(graph.nodes):
            if self.why_not(graph, weights, norm) is None:
                yield Rewrite(norm.name, module_of(norm.name), partial(_fuse, graph, norm))

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str | None:
        """Why a node stays; None where it does not."""
        if node.domain != DOMAIN or node.op != "AddRMSNorm":
            return f"{node.op} is no AddRMSNorm"
        between = _chain(node)
        if between is None:
            return f"its branch, {node.inputs[1].name}, is no all-reduce's, or one that is reshaped"
        for each in between:
            (tensor,) = each.outputs
            if is_any_of(tensor, graph.outputs):
                return f"{tensor.name} is an output of the graph"
            if len(tensor.outputs) > 1:
                return f"{tensor.name} is read by others too"
        return None


def _chain(norm: gs.Node) -> list[gs.Node] | None:
    """The all-reduce of the branch, and the reshape after it if there is one."""
    last = producer_of(norm.inputs[1])
    if last is not None and last.op == "Reshape" and last.domain in ("", None):
        before = producer_of(last.inputs[0])
        return [before, last] if before is not None and _is_all_reduce(before) else None
    return [last] if last is not None and _is_all_reduce(last) else None


def _is_all_reduce(node: gs.Node) -> bool:
    return node.domain == DOMAIN and node.op == "AllReduce"


def _fuse(graph: gs.Graph, norm: gs.Node) -> str:
    chain = _chain(norm)
    assert chain is not None
    reduce, group = chain[0], chain[0].attrs["group"]
    residual, branch, weight = norm.inputs
    partial_sum = reduce.inputs[0]
    if len(chain) > 1:
        chain[1].inputs[0] = partial_sum
        partial_sum = gs.Variable(f"{branch.name}/partial", branch.dtype, branch.shape)
        chain[1].outputs = [partial_sum]
    outputs, at = list(norm.outputs), position_of(norm, graph)
    reduce.outputs.clear()
    norm.outputs.clear()
    attributes = {"epsilon": norm.attrs["epsilon"], "group": group}
    fused = ALL_REDUCE_ADD_RMS_NORM.node(reduce.name, [residual, partial_sum, weight], outputs, attributes)
    graph.nodes.insert(at, fused)
    return "fused AllReduce and AddRMSNorm"
