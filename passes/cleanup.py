"""Clean-up: nodes that only repeat their input are bypassed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.graph import module_of
from moecompiler.passes.dtypes import onnx_dtype
from moecompiler.passes.rewiring import is_any_of, redirect_readers
from moecompiler.pipeline import Rewrite
from moecompiler.weights import Recipe


class CleanUp:
    """Removes nodes that do nothing: identities, casts and reshapes to what a tensor is already, slices of everything,
    concatenations of one tensor, expansions to the same shape."""

    name = "clean-up"
    needs = "nothing"
    must_match = "never: a graph may have no such nodes"
    guarantees = "no node is left that is known to repeat its input, save those that write outputs of the graph"

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        for node in list(graph.nodes):
            if self.why_not(graph, weights, node) is None:
                yield Rewrite(node.name, module_of(node.name), partial(_bypass, node))

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str | None:
        """Why a node stays; None where it does not."""
        rule = _RULES.get(node.op) if node.domain in ("", None) else None
        if rule is None:
            return f"{node.op} is no operator that can do nothing"
        if is_any_of(node.outputs[0], graph.outputs):
            return "it writes an output of the graph, which has its name from it"
        return None if rule(node) else f"this {node.op} is not known to leave its input as it is"


def _bypass(node: gs.Node) -> str:
    redirect_readers(node.outputs[0], node.inputs[0])
    node.outputs.clear()
    return f"removed {node.op}"


def _same_type(a: gs.Tensor, b: gs.Tensor) -> bool:
    return onnx_dtype(a) is not None and onnx_dtype(a) == onnx_dtype(b)


def _same_static_shape(a: gs.Tensor, b: gs.Tensor) -> bool:
    return _is_static(a.shape) and _is_static(b.shape) and list(a.shape) == list(b.shape)


def _is_static(shape: Sequence[int | str] | None) -> bool:
    return shape is not None and all(isinstance(dim, int) for dim in shape)


def _is_noop_cast(node: gs.Node) -> bool:
    return onnx_dtype(node.inputs[0]) == int(node.attrs["to"])


def _is_noop_slice(node: gs.Node) -> bool:
    """From 0 to the end in steps of 1, on every axis it names."""
    data, *bounds = node.inputs
    if not all(isinstance(tensor, gs.Constant) for tensor in bounds) or data.shape is None:
        return False
    starts, ends = bounds[0].values, bounds[1].values
    axes = bounds[2].values if len(bounds) > 2 else np.arange(len(starts))
    steps = bounds[3].values if len(bounds) > 3 else np.ones(len(starts), np.int64)
    return all(
        start == 0 and step == 1 and _reaches_end(end, data.shape[axis])
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    )


def _reaches_end(end: int, dim: int | str) -> bool:
    return end >= dim if isinstance(dim, int) else bool(end >= np.iinfo(np.int32).max)


# no Squeeze: without axes it removes every axis of size 1 in ONNX Runtime, and none by ONNX's reference
_RULES: dict[str, Callable[[gs.Node], bool]] = {
    "Identity": lambda node: True,
    "Cast": _is_noop_cast,
    "CastLike": lambda node: _same_type(node.inputs[0], node.inputs[1]),
    "Concat": lambda node: len(node.inputs) == 1,
    "Slice": _is_noop_slice,
    "Reshape": lambda node: _same_static_shape(node.inputs[0], node.outputs[0]),
    "Expand": lambda node: _same_static_shape(node.inputs[0], node.outputs[0]),
    "Transpose": lambda node: list(node.attrs.get("perm", ())) == list(range(len(node.attrs.get("perm", ())))) != [],
    "Unsqueeze": lambda node: isinstance(node.inputs[1], gs.Constant) and node.inputs[1].values.size == 0,
}
