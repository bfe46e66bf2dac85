"""A plugin that only copies, behind the sum over experts that TensorRT computes itself beside plugins.

TensorRT's compiler up to 10.10 cannot build such a region (``gvn.cpp:311: CHECK(graph().ssa_validation()) failed``, or the same
by ``ir_verifier.cpp``; TensorRT issue 4468, mended in 10.11): routing and experts between two plugins, a rank's all-reduces among
them. A graph without plugins is one region and builds. Of all places only this one helps float16 and bfloat16: the sum,
``[tokens, hidden]`` float32, before it is rounded.
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
    """Puts one behind each sum over the experts of ``moe`` (names of inlined nodes): ``ReduceSum``, in ``MoE``'s body."""
    sums = {
        node.output[0]: node.name.rpartition(".")[0]
        for node in model.graph.node
        if node.op_type == "ReduceSum" and node.name.rpartition(".")[0] in moe
    }
    nodes = []
    for node in model.graph.node:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        copy.input[:] = [f"{name}/apart" if name in sums else name for name in node.input]
        nodes.append(copy)
        nodes += [_barrier(sums[name], name, f"{name}/apart") for name in node.output if name in sums]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _barrier(moe: str, x: str, y: str) -> onnx.NodeProto:
    where = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
    return helper.make_node(plugin_name(BARRIER), [x], [y], f"{moe}.{BARRIER}", domain=DOMAIN, **where)
