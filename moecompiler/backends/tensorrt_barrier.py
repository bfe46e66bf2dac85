"""A plugin that only copies, between routing and experts that TensorRT computes itself beside plugins.

TensorRT's compiler up to 10.10 cannot build such a region (``gvn.cpp:311: CHECK(graph().ssa_validation()) failed``; TensorRT
issue 4468, mended in 10.11): norm, routing and experts between two plugins, a rank's all-reduces among them. A graph without
plugins is one region and builds. Of all places only this one helps: the experts' shares, ``[local experts, tokens, 1]`` float32,
a copy of kilobytes.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import helper

from moecompiler.graph import DOMAIN
from moecompiler.ops import VERSION, plugin_name

BARRIER = "Barrier"


def moe_without_plugin(model: onnx.ModelProto, chosen: Collection[str]) -> tuple[str, ...]:
    """Names of the nodes whose bodies need a barrier: those of routed experts that are no plugin where something else is one."""
    if not chosen:
        return ()
    ours = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type.startswith("MoE")]
    return tuple(node.name for node in ours if node.name not in chosen)


def add_barriers(model: onnx.ModelProto, moe: Collection[str]) -> None:
    """Puts one before each product by which the results of the experts of ``moe`` (names of inlined nodes) are weighted.

    That product is the one that ``ReduceSum`` adds up over the experts; the shares are its second factor, as in ``MoE``'s body.
    """
    made = {output: node for node in model.graph.node for output in node.output}
    barriers = {}
    for node in model.graph.node:
        product = made.get(node.input[0]) if node.op_type == "ReduceSum" else None
        if product is not None and product.op_type == "Mul" and product.name.rpartition(".")[0] in moe:
            shares = product.input[1]
            product.input[1] = f"{shares}/apart"
            barriers[product.name] = _barrier(product.name.rpartition(".")[0], shares, product.input[1])
    nodes = [each for node in model.graph.node for each in (barriers.get(node.name), node) if each is not None]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _barrier(moe: str, x: str, y: str) -> onnx.NodeProto:
    where = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
    return helper.make_node(plugin_name(BARRIER), [x], [y], f"{moe}.{BARRIER}", domain=DOMAIN, **where)
