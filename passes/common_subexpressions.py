"""Common subexpressions: what is computed twice from the same inputs is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.graph import DOMAIN, exchanges, module_of
from moecompiler.passes.rewiring import NOT_PURE, is_any_of, redirect_readers
from moecompiler.pipeline import Rewrite
from moecompiler.weights import Recipe

_LARGEST_COMPARED = 1024  # elements of a constant; larger ones are equal only if they are the same tensor


class CommonSubexpressions:
    """Keeps the first of several nodes with the same op, attributes and inputs; equal small constants count as the same input.

    The node that stays keeps its origin, so a node that serves two modules is named after the first. Collectives stay, and
    nodes that write graph outputs.
    """

    name = "common-subexpressions"
    needs = "nothing"
    must_match = "never: a graph may compute everything once"
    guarantees = (
        "no two nodes compute the same of the same inputs, save collectives and those that write outputs of the graph"
    )

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        first: dict[Any, gs.Node] = {}
        for node in list(graph.nodes):
            if not _is_mergeable(node):
                continue
            kept = first.setdefault(_key(node, weights), node)
            if kept is not node and len(kept.outputs) == len(node.outputs) and not _writes_output(node, graph):
                yield Rewrite(node.name, module_of(node.name), partial(_merge, node, kept))

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str:
        """Why a node stays."""
        if not _is_mergeable(node):
            return f"{node.op} is left alone: it is a collective, or not pure, or holds a graph"
        if _writes_output(node, graph):
            return "it writes an output of the graph"
        return f"no {node.op} before it has the same inputs and attributes"


def _merge(node: gs.Node, kept: gs.Node) -> str:
    for old, new in zip(node.outputs, kept.outputs, strict=True):
        redirect_readers(old, new)
    return f"merged {node.op} into {kept.name}"


def _key(node: gs.Node, weights: dict[str, Recipe]) -> Any:
    inputs = tuple(_identity(tensor, weights) for tensor in node.inputs)
    return node.op, node.domain or "", _attributes(node), inputs


def _is_mergeable(node: gs.Node) -> bool:
    standard = node.domain in ("", None) and node.op not in NOT_PURE
    fused = node.domain == DOMAIN and not exchanges(node.op)
    return (standard or fused) and not any(isinstance(value, gs.Graph) for value in node.attrs.values())


def _writes_output(node: gs.Node, graph: gs.Graph) -> bool:
    return any(is_any_of(tensor, graph.outputs) for tensor in node.outputs)


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
