"""Our collectives → ``DistCollective``, which TensorRT-RTX's parser reads and its engines run over NCCL.

An engine gets its communicator when it runs. It must be that of the rank's group, so nodes name no ranks themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from moecompiler.errors import UserError
from moecompiler.graph import DOMAIN, ONNX_DTYPES

TENSORRT_DOMAIN = "tensorrt"  # TensorRT-RTX's own operators; its parser goes by names and ignores domains
_FRONT = "all_gather/front"


def lower_collectives(model: onnx.ModelProto, dtype: str) -> tuple[int, ...]:
    """Rewrites the collectives of a model of floating-point type ``dtype`` in place; returns the ranks that take part in them, in
    order (empty: it has none).

    Raises: UserError where they are of several groups: an engine has one communicator.
    """
    graph = model.graph
    groups = {_group(node) for node in graph.node if _is_collective(node)}
    if len(groups) > 1:
        raise UserError(f"the graph has collectives of several groups of ranks, {sorted(groups)}: an engine takes one")
    if not groups:
        return ()
    (group,) = groups
    nodes = [made for node in graph.node for made in _lowered(node, len(group), dtype)]
    if any(_FRONT in node.input for node in nodes):
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), _FRONT))
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    model.opset_import.append(helper.make_opsetid(TENSORRT_DOMAIN, 1))
    return group


def _is_collective(node: NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in ("AllReduce", "AllGather")


def _group(node: NodeProto) -> tuple[int, ...]:
    return tuple(helper.get_node_attr_value(node, "group"))


def _lowered(node: NodeProto, ranks: int, dtype: str) -> Iterator[NodeProto]:
    if not _is_collective(node):
        yield node
    elif node.op_type == "AllReduce":
        yield from _all_reduce(node, ranks, dtype)
    else:
        yield from _all_gather(node, ranks)


def _all_reduce(node: NodeProto, ranks: int, dtype: str) -> Iterator[NodeProto]:
    """The sum, in float32, rounded once. Of two numbers that is what adding them in their own type gives."""
    (x,), (y,) = node.input, node.output
    if ranks == 2 or dtype == "float32":
        yield _collective(node.name, x, y, ranks, "all_reduce", "sum")
        return
    wide, total = f"{y}/wide", f"{y}/total"
    yield helper.make_node("Cast", [x], [wide], f"{node.name}.in", to=TensorProto.FLOAT)
    yield _collective(node.name, wide, total, ranks, "all_reduce", "sum")
    yield helper.make_node("Cast", [total], [y], f"{node.name}.out", to=ONNX_DTYPES[dtype])


def _all_gather(node: NodeProto, ranks: int) -> Iterator[NodeProto]:
    """``DistCollective`` gathers along the first axis, ours along the last."""
    (x,), (y,) = node.input, node.output
    row, rows, joined = f"{y}/row", f"{y}/rows", f"{y}/joined"
    parts = [f"{y}/part.{index}" for index in range(ranks)]
    yield helper.make_node("Unsqueeze", [x, _FRONT], [row], f"{node.name}.in")
    yield _collective(node.name, row, rows, ranks, "all_gather", "none")
    yield helper.make_node("Split", [rows], parts, f"{node.name}.parts", axis=0, num_outputs=ranks)
    yield helper.make_node("Concat", parts, [joined], f"{node.name}.joined", axis=-1)
    yield helper.make_node("Squeeze", [joined, _FRONT], [y], f"{node.name}.out")


def _collective(name: str, x: str, y: str, ranks: int, operation: str, reduction: str) -> NodeProto:
    return helper.make_node(
        "DistCollective",
        [x],
        [y],
        name,
        domain=TENSORRT_DOMAIN,
        collective_operation=operation,
        reduce_op=reduction,
        root=-1,
        nb_rank=ranks,
    )
