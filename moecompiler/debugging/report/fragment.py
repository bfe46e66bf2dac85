"""A small part of a graph, as it is to be drawn: plain data, taken from onnx-graphsurgeon's objects while they last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.debugging.watching import Held

MOST_ELEMENTS = 8  # of a constant that is written out


class Mark(StrEnum):
    """What a rewrite does to a node: the graph has it before alone, after alone, with other inputs, outputs or attributes, or
    as it was."""

    removed = "removed"
    added = "added"
    changed = "changed"
    context = "context"


@dataclass(frozen=True)
class Tensor:
    """A tensor on an edge; ``role``: "input" or "output" of the graph, else empty. ``unseen``: how many of its readers are not
    drawn."""

    name: str
    type: str
    role: str = ""
    unseen: int = 0


@dataclass(frozen=True)
class Node:
    """``constants``: the inputs that are constants or weights, ``slot: text``; the others are ``inputs``, slot and tensor."""

    name: str
    op: str
    mark: Mark
    attributes: str
    constants: tuple[str, ...]
    inputs: tuple[tuple[int, str], ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Fragment:
    """Nodes in the graph's order, and by name the tensors that are drawn between them. ``omitted``: how many more nodes were
    changed just as some of these were."""

    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    omitted: int = 0

    def to_json(self) -> dict[str, Any]:
        """Nodes as ``name, op, mark, attributes, constants, inputs, outputs``, tensors as ``name: type``."""
        return {
            "nodes": [
                {
                    "name": node.name,
                    "op": node.op,
                    "mark": str(node.mark),
                    "attributes": node.attributes,
                    "constants": list(node.constants),
                    "inputs": [name for _, name in node.inputs],
                    "outputs": list(node.outputs),
                }
                for node in self.nodes
            ],
            "tensors": {name: tensor.type for name, tensor in self.tensors.items()},
            "omitted": self.omitted,
        }


def make_node(held: Held, mark: Mark, types: Mapping[str, str]) -> Node:
    """The node as ``held`` has it."""
    slots = [(slot, tensor) for slot, tensor in enumerate(held.inputs) if not tensor.is_empty()]
    return Node(
        held.name,
        f"{held.domain}::{held.op}" if held.domain else held.op,
        mark,
        ", ".join(f"{name}={value_text(value)}" for name, value in sorted(held.attrs.items())),
        tuple(f"{slot}: {constant_text(t, types)}" for slot, t in slots if isinstance(t, gs.Constant)),
        tuple((slot, t.name) for slot, t in slots if not isinstance(t, gs.Constant)),
        tuple(tensor.name for tensor in held.outputs if tensor.name),
    )


def type_text(tensor: gs.Tensor, types: Mapping[str, str]) -> str:
    """``float16[batch, 32]``: what the file says of the tensor of that name, else what the object does; "" if neither does."""
    if tensor.name in types:
        return types[tensor.name]
    if tensor.dtype is None:
        return ""
    code = tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
    dims = "..." if tensor.shape is None else ", ".join(map(str, tensor.shape))
    return f"{TensorProto.DataType.Name(code).lower()}[{dims}]"


def constant_text(tensor: gs.Constant, types: Mapping[str, str]) -> str:
    """The values of a small constant; of a larger one, or a weight, name and type."""
    values = _values(tensor)
    kind = type_text(tensor, types)
    return f"{tensor.name} {kind}" if values is None else f"{_list_text(values)} {kind}"


def value_text(value: Any) -> str:
    """An attribute's value."""
    if isinstance(value, gs.Constant):
        values = _values(value)
        return f"{type_text(value, {})}" if values is None else _list_text(values)
    if isinstance(value, gs.Graph):
        return f"graph of {len(value.nodes)} nodes"
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _values(tensor: gs.Constant) -> np.ndarray | None:
    """What a small constant holds. Not through ``tensor.values``, which would load what others hold by reference."""
    if math.prod(tensor.shape or ()) > MOST_ELEMENTS:
        return None
    held = tensor._values
    if isinstance(held, LazyValues):
        if held.tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(held.tensor)
    return np.asarray(held)


def _list_text(values: np.ndarray) -> str:
    """Floating-point numbers in six digits."""
    if values.dtype.kind not in "biuOSU":  # also bfloat16 and the like, whose kind is no "f"
        rounded = [float(f"{float(each):.6g}") for each in values.ravel()]
        values = np.array(rounded).reshape(values.shape)
    return str(values.tolist())
