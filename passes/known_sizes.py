"""Sizes that shape inference knows, where a graph computes them as it runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.passes.pattern import producer_of, small_constant


def known_sizes(node: gs.Node) -> np.ndarray | None:
    """What ``node`` yields, int64, if it takes sizes of a tensor of which those are known: a ``Shape``, or a ``Gather`` or
    ``Slice`` of one."""
    if node.domain not in ("", None):
        return None
    if node.op == "Shape":
        return _as_known(_dims(node))
    shape = producer_of(node.inputs[0]) if node.op in ("Gather", "Slice") else None
    if shape is None or shape.op != "Shape" or shape.domain not in ("", None):
        return None
    dims = _dims(shape)
    given = [small_constant(tensor) for tensor in node.inputs[1:]]
    if dims is None or any(each is None for each in given):
        return None
    if node.op == "Slice":
        start, end, _, step = [int(each.item()) for each in given if each is not None] + [0, 1][len(given) - 2 :]
        return _as_known(dims[slice(start, end, step)])
    (places,) = given
    assert places is not None
    taken = _as_known([dims[place] for place in places.reshape(-1)])
    return None if taken is None else taken.reshape(places.shape)


def _dims(shape: gs.Node) -> list[int | str] | None:
    """The dims that a ``Shape`` node gives; those that are not known are names, or 0 where they have none."""
    dims = shape.inputs[0].shape
    if dims is None:
        return None
    start, end = shape.attrs.get("start", 0), shape.attrs.get("end")
    return list(dims)[start:end]


def _as_known(dims: Sequence[int | str] | None) -> np.ndarray | None:
    if dims is None or not all(isinstance(dim, int) and dim > 0 for dim in dims):
        return None
    return np.array(dims, np.int64)
