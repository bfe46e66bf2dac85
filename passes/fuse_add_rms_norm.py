"""Residual addition and the RMS normalization after it → ``moecompiler::AddRMSNorm``."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from moecompiler.graph import DOMAIN, module_of, node_name
from moecompiler.ops import OpSpec
from moecompiler.passes.pattern import producer_of
from moecompiler.pipeline import Change
from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM
from moecompiler.weights import Recipe


class FuseAddRMSNorm:
    """Fuses each RMSNorm with the addition it reads; the sum stays an output, for the residual stream goes on."""

    name = "fuse-add-rms-norm"

    def spec_of(self, node: gs.Node) -> OpSpec | None:
        return ADD_RMS_NORM if node.op == ADD_RMS_NORM.name else None

    def rewrite(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Change]:
        changes = []
        for norm in list(graph.nodes):
            if norm.domain != DOMAIN or norm.op != "RMSNorm":
                continue
            add = producer_of(norm.inputs[0])
            if add is None or add.op != "Add" or not _same_shape(add):
                continue
            (x,), (y,), weight = add.outputs, norm.outputs, norm.inputs[1]
            residual, branch = add.inputs
            at = graph.nodes.index(add)
            for node in (add, norm):
                node.outputs.clear()
            name = node_name(module_of(norm.name), f"AddRMSNorm_{norm.name.rpartition('_')[2]}")
            graph.nodes.insert(at, ADD_RMS_NORM.node(name, [residual, branch, weight], [y, x], norm.attrs))
            changes.append(Change("fused Add and RMSNorm", norm.name, module_of(norm.name)))
        return changes


def _same_shape(add: gs.Node) -> bool:
    """Both operands are activations of the same shape; an addition that broadcasts is no residual."""
    left, right = add.inputs
    variables = isinstance(left, gs.Variable) and isinstance(right, gs.Variable)
    return variables and left.shape is not None and right.shape is not None and list(left.shape) == list(right.shape)
