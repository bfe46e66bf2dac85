"""Residual addition and the RMS normalization after it → ``moecompiler::AddRMSNorm``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import onnx_graphsurgeon as gs

from moecompiler.graph import DOMAIN, module_of, node_name
from moecompiler.ops import OpSpec
from moecompiler.passes.pattern import producer_of
from moecompiler.passes.rewiring import position_of
from moecompiler.pipeline import Rewrite
from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM
from moecompiler.weights import Recipe


class FuseAddRMSNorm:
    """Fuses each RMSNorm with the addition it reads; the sum stays an output, for the residual stream goes on."""

    name = "fuse-add-rms-norm"
    needs = "fuse-rms-norm"
    must_match = "never: a norm may read something else than a sum"
    guarantees = "no norm that is an op reads the sum of two activations of one shape"

    def spec_of(self, node: gs.Node) -> OpSpec | None:
        return ADD_RMS_NORM if node.op == ADD_RMS_NORM.name else None

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        for norm in list(graph.nodes):
            if self.why_not(graph, weights, norm) is None:
                yield Rewrite(norm.name, module_of(norm.name), partial(_fuse, graph, norm))

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str | None:
        """Why a node stays; None where it does not."""
        if node.domain != DOMAIN or node.op != "RMSNorm":
            return f"{node.op} is no RMSNorm"
        add = producer_of(node.inputs[0])
        if add is None or add.op != "Add":
            return f"what it normalizes, {node.inputs[0].name}, is no sum"
        return None if _same_shape(add) else f"{add.name} adds tensors of unlike or unknown shapes: no residual"


def _fuse(graph: gs.Graph, norm: gs.Node) -> str:
    (add,) = norm.inputs[0].inputs
    (x,), (y,), weight = add.outputs, norm.outputs, norm.inputs[1]
    residual, branch = add.inputs
    at = position_of(add, graph)
    for node in (add, norm):
        node.outputs.clear()
    name = node_name(module_of(norm.name), f"AddRMSNorm_{norm.name.rpartition('_')[2]}")
    graph.nodes.insert(at, ADD_RMS_NORM.node(name, [residual, branch, weight], [y, x], norm.attrs))
    return "fused Add and RMSNorm"


def _same_shape(add: gs.Node) -> bool:
    """Both operands are activations of the same shape; an addition that broadcasts is no residual."""
    left, right = add.inputs
    variables = isinstance(left, gs.Variable) and isinstance(right, gs.Variable)
    return variables and left.shape is not None and right.shape is not None and list(left.shape) == list(right.shape)
