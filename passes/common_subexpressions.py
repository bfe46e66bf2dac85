"""Common subexpressions: what is computed twice from the same inputs is computed once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.graph import DOMAIN, module_of
from moecompiler.passes.rewiring import NOT_PURE, redirect_readers
from moecompiler.pipeline import Change
from moecompiler.weights import Recipe

_LARGEST_COMPARED = 1024  # elements of a constant; larger ones are equal only if they are the same tensor


class CommonSubexpressions:
    """Keeps the first of several nodes with the same op, attributes and inputs; equal small constants count as the same input.

    The node that stays keeps its origin, so a node that serves two modules is named after the first. Collectives and nodes
    that write graph outputs are left alone.
    """

    name = "common-subexpressions"

    def rewrite(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Change]:
        first: dict[Any, gs.Node] = {}
        changes = []
        for node in graph.nodes:
            if not _may_merge(node, graph):
                continue
            key = (
                node.op,
                node.domain or "",
                _attributes(node),
                tuple(_identity(tensor, weights) for tensor in node.inputs),
            )
            kept = first.setdefault(key, node)
            if kept is node or len(kept.outputs) != len(node.outputs):
                continue
            for old, new in zip(node.outputs, kept.outputs, strict=True):
                redirect_readers(old, new)
            changes.append(Change(f"merged {node.op} into {kept.name}", node.name, module_of(node.name)))
        return changes


def _may_merge(node: gs.Node, graph: gs.Graph) -> bool:
    standard = node.domain in ("", None) and node.op not in NOT_PURE
    fused = node.domain == DOMAIN and node.op not in ("AllReduce", "AllGather")
    writes_output = any(tensor is output for tensor in node.outputs for output in graph.outputs)
    has_subgraph = any(isinstance(value, gs.Graph) for value in node.attrs.values())
    return (standard or fused) and not writes_output and not has_subgraph


def _identity(tensor: gs.Tensor, weights: dict[str, Recipe]) -> Any:
    """What makes two inputs the same: being one tensor, or equal small constants."""
    if isinstance(tensor, gs.Constant) and tensor.name not in weights:
        return _constant_key(tensor)
    return "" if tensor.is_empty() else id(tensor)


def _constant_key(constant: gs.Constant) -> Any:
    if int(np.prod(constant.shape or (), dtype=np.int64)) > _LARGEST_COMPARED:
        return id(constant)
    held = constant._values
    if isinstance(held, LazyValues):
        copy = type(held.tensor)()
        copy.CopyFrom(held.tensor)
        copy.name = ""
        return copy.SerializeToString(deterministic=True)
    return str(constant.dtype), tuple(constant.shape), np.asarray(constant.values).tobytes()


def _attributes(node: gs.Node) -> tuple[Any, ...]:
    def key(value: Any) -> Any:
        if isinstance(value, gs.Constant):
            return _constant_key(value)
        return tuple(value) if isinstance(value, list) else value

    return tuple((name, key(value)) for name, value in sorted(node.attrs.items()))
