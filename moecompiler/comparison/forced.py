"""Routing replayed: programs whose routers are told their logits.

The logits are an input of the graph, of the graph's own type, ``[batch, sequence, columns]``: those of all experts, then zeros.
Where the graph has a router's logits as a tensor, the input takes its place. Where a fused op routes by itself, it stays the op
it is: its tokens get ``columns`` more features, which are the logits; its router reads those alone, by rows of the identity;
and its experts have zeros for them, and make zeros of that many more results, which are cut off. So the same plugin, or the
same body, computes the same sums, with exactly these logits. It works for all three normalization modes, which are functions of
the logits (``moecompiler.routing``).

Logits are rounded to the graph's type, and the reference gets the rounded ones too: then choices are the same everywhere,
ties going to the lower number, and so are weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd, lcm
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from moecompiler.comparison.nodes import is_op_node, layer_of
from moecompiler.comparison.observed import router_taps
from moecompiler.errors import UserError
from moecompiler.graph import ONNX_DTYPES, Program, floating_type, weight_tensor
from moecompiler.quantization.schemes import NVFP4_BLOCK
from moecompiler.weights import NUMPY_DTYPES, Recipe

_ALIGNMENT = 128  # of features, where they are aligned so


def forced_name(layer: int) -> str:
    """The input that a layer's router logits come in by."""
    return f"forced.{layer}.logits"


def force_routing(program: Program) -> Program:
    """The program with an input ``forced_name`` for each of its layers. Weights of fused ops are to be read by a
    ``padded_reader.PaddedReader``.

    Raises: UserError where weights are not laid out as ``export`` lays them out, or nothing routes.
    """
    model, weights = onnx.ModelProto(), dict(program.weights)
    model.CopyFrom(program.model)
    dtype = floating_type(program)
    taps = {tap.layer: tap for tap in router_taps(program, ())}
    if not taps:
        raise UserError("routing cannot be replayed: the graph has no routers that are known as such")
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        tap = taps.get(layer_of(node.name) or 0) if layer_of(node.name) is not None else None
        if tap is not None and tap.router is not None and is_op_node(node) and tap.tensor == node.input[0]:
            nodes += _told(node, tap.layer, model, weights, dtype) if node.op_type.startswith("MoE") else [node]
        else:
            nodes.append(node)
            if tap is not None and tap.router is None and tap.tensor in node.output:
                node.output[list(node.output).index(tap.tensor)] = f"{tap.tensor}/own"
                nodes += _in_place_of(tap.tensor, tap.layer, model, dtype)
    _set(model.graph.node, nodes)
    read = {name for node in model.graph.node for name in node.input}
    _set(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in read])
    return Program(model, {name: recipe for name, recipe in weights.items() if name in read})


def extra_columns(hidden: int, experts: int, block: int) -> int:
    """How many features are added: enough for the experts, and of whole blocks; as ``hidden`` is a multiple of 128, or of a
    smaller power of two, so is the sum."""
    unit = lcm(gcd(hidden, _ALIGNMENT), block or 1)
    return -(-experts // unit) * unit


def padded(recipe: Recipe, expands: bool, hidden: int, extra: int) -> Recipe:
    """The recipe of an experts' weight, or of a part of its codes, for ``extra`` more features: of tokens where it ``expands``
    them to the intermediate size (``gate_up``), else of results (``down``). The reader gives zeros for them.

    Raises: UserError where its rows are not those of the checkpoint.
    """
    if recipe.quantized is not None:
        source = padded(recipe.quantized.source, expands, hidden, extra)
        return Recipe(
            recipe.dtype,
            _grown(recipe.shape, expands, hidden, extra),
            quantized=replace(recipe.quantized, source=source),
        )
    pieces = []
    for piece in recipe.pieces:
        rows, columns = piece.shape[-2:]
        if list(piece.perm) != sorted(piece.perm) or (columns if expands else rows) != hidden:
            raise UserError(f"routing cannot be replayed: {piece.source} is not held as rows of its features")
        grown = (rows, columns + extra) if expands else (rows + extra, columns)
        pieces.append(replace(piece, shape=(*piece.shape[:-2], *grown)))
    return Recipe(recipe.dtype, _grown(recipe.shape, expands, hidden, extra), tuple(pieces))


def _grown(shape: tuple[int, ...], expands: bool, hidden: int, extra: int) -> tuple[int, ...]:
    """Of codes, two to a byte or not, of scales, by blocks or by rows, or of the weight ``[experts, rows, columns]``."""
    if expands:
        # scales of rows have no columns
        return (*shape[:-1], shape[-1] * (hidden + extra) // hidden) if len(shape) > 1 else shape
    axis = 1 if len(shape) == 3 else 0
    return (*shape[:axis], shape[axis] * (hidden + extra) // hidden, *shape[axis + 1 :])


def _told(
    node: NodeProto, layer: int, model: onnx.ModelProto, weights: dict[str, Recipe], dtype: str
) -> list[NodeProto]:
    """A fused MoE that is told its logits, and what is around it."""
    function = next(f for f in model.functions if (f.domain, f.name) == (node.domain, node.op_type))
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    experts, hidden = weights[node.input[1]].shape
    block = attributes.get("block_size", NVFP4_BLOCK if "Nvfp4" in node.op_type else 0)
    extra = extra_columns(hidden, experts, block)
    types = {value.name: value for value in (*model.graph.input, *model.graph.value_info)}
    x, y, prefix = node.input[0], node.output[0], f"{node.name}/forced"
    router = np.zeros((experts, hidden + extra), NUMPY_DTYPES[dtype])
    router[:, hidden : hidden + experts] = np.eye(experts)
    constants: dict[str, Any] = {"router": router, "rows": np.array([-1, extra]), "first": np.array([0])}
    constants |= {"end": np.array([hidden]), "axis": np.array([1])}
    model.graph.initializer.extend(
        numpy_helper.from_array(each, f"{prefix}.{name}") for name, each in constants.items()
    )
    for index, name in enumerate(function.input):
        recipe = weights.get(node.input[index])
        if recipe is None or not name.startswith(("gate_up", "down")) or name.endswith(("input_scales", "positions")):
            continue
        wide = f"{prefix}.{name}"
        weights[wide] = padded(recipe, name.startswith("gate_up"), hidden, extra)
        model.graph.initializer.append(weight_tensor(wide, weights[wide]))
        node.input[index] = wide
    node.input[0], node.input[1], node.output[0] = f"{prefix}.x", f"{prefix}.router", f"{prefix}.y"
    _add_input(model, layer, extra, dtype)
    for old, new in ((x, f"{prefix}.x"), (y, f"{prefix}.y")):
        model.graph.value_info.append(_wider(types[old], new, hidden + extra))
    return [
        helper.make_node("Reshape", [forced_name(layer), f"{prefix}.rows"], [f"{prefix}.logits"], f"{prefix}.Reshape"),
        helper.make_node("Concat", [x, f"{prefix}.logits"], [f"{prefix}.x"], f"{prefix}.Concat", axis=1),
        node,
        helper.make_node(
            "Slice", [f"{prefix}.y", f"{prefix}.first", f"{prefix}.end", f"{prefix}.axis"], [y], f"{prefix}.Slice"
        ),
    ]


def _in_place_of(tensor: str, layer: int, model: onnx.ModelProto, dtype: str) -> list[NodeProto]:
    """What makes the tensor of a router's logits of the input."""
    info = next(value for value in model.graph.value_info if value.name == tensor).type.tensor_type
    experts = info.shape.dim[-1].dim_value
    prefix = f"{tensor}/forced"
    _add_input(model, layer, experts, dtype)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, experts]), f"{prefix}.rows"))
    return [
        helper.make_node("Reshape", [forced_name(layer), f"{prefix}.rows"], [f"{prefix}.logits"], f"{prefix}.Reshape"),
        helper.make_node("Cast", [f"{prefix}.logits"], [tensor], f"{prefix}.Cast", to=info.elem_type),
    ]


def _add_input(model: onnx.ModelProto, layer: int, columns: int, dtype: str) -> None:
    shape = ["batch", "sequence", columns]
    model.graph.input.append(helper.make_tensor_value_info(forced_name(layer), ONNX_DTYPES[dtype], shape))


def _wider(value: onnx.ValueInfoProto, name: str, columns: int) -> onnx.ValueInfoProto:
    wide = onnx.ValueInfoProto()
    wide.CopyFrom(value)
    wide.name = name
    wide.type.tensor_type.shape.dim[-1].Clear()
    wide.type.tensor_type.shape.dim[-1].dim_value = columns
    return wide


def _set(field: Any, messages: Sequence[NodeProto | TensorProto]) -> None:
    copies = [type(each).FromString(each.SerializeToString()) for each in messages]
    del field[:]
    field.extend(copies)
