"""What FP8 weights get, rounded, in programs that hold the numbers which their codes stand for.

Products with such a weight, in the graph or in the body of an op, get ``QuantizeLinear`` and ``DequantizeLinear`` in front, in
float32. Passes and ops have no say in it: what they make of a weight is compared with this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from moecompiler.graph import DOMAIN, Program
from moecompiler.weights import Part, Recipe

_SCALES = ".input_scales"


def scales_by_source(quantized: Program) -> dict[str, float]:
    """The static scale of what meets each tensor of the checkpoint that is held as FP8."""
    found: dict[str, float] = {}
    for name, recipe in quantized.weights.items():
        if recipe.values is None or not name.endswith(_SCALES):
            continue
        codes = quantized.weights[f"{name.removesuffix(_SCALES)}.{Part.CODES}"].quantized
        assert codes is not None
        for piece in codes.source.pieces:
            found[piece.source] = float(recipe.values[piece.at[0] if len(codes.source.shape) == 3 else 0])
    return found


def with_rounded_inputs(model: onnx.ModelProto, weights: Mapping[str, Recipe], scales: Mapping[str, float]) -> None:
    """Has each product of ``model`` with one of ``weights``, recipes of boxes of tensors that ``scales`` has, round what it
    multiplies; changes ``model``."""
    arrays = {name: array for name, recipe in weights.items() if (array := _scales_of(recipe, scales)) is not None}
    if not arrays:
        return
    bodies = {function.name: function for function in model.functions if function.domain == DOMAIN}
    nodes: list[NodeProto] = []
    for node in _rounded(model.graph.node, {name: f"{name}{_SCALES}" for name in arrays}):
        body = bodies.get(node.op_type) if node.domain == DOMAIN else None
        if body is not None and any(name in arrays for name in node.input):
            _round_inside(model, node, body, arrays)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(array, f"{name}{_SCALES}") for name, array in arrays.items())


def _scales_of(recipe: Recipe, scales: Mapping[str, float]) -> np.ndarray | None:
    """float32 ``[1]``, or ``[experts, 1, 1]``; None for what is no FP8 weight."""
    if not recipe.is_boxes or not recipe.pieces or not all(piece.source in scales for piece in recipe.pieces):
        return None
    by_expert = len(recipe.shape) == 3
    values = np.zeros(recipe.shape[0] if by_expert else 1, np.float32)
    for piece in recipe.pieces:
        values[piece.at[0] if by_expert else 0] = scales[piece.source]
    return values[:, None, None] if by_expert else values


def _rounded(nodes: Iterable[NodeProto], scales: Mapping[str, str]) -> list[NodeProto]:
    """The nodes, with what meets a weight rounded before it is multiplied. ``scales``: by the name of a weight, that of its
    scales."""
    scales, result = dict(scales), list[NodeProto]()
    for node in nodes:
        if node.op_type == "Transpose" and node.input[0] in scales:
            scales[node.output[0]] = scales[node.input[0]]
        if node.op_type == "MatMul" and node.input[1] in scales:
            rounded = f"{node.output[0]}/rounded_input"
            result += _rounding(node.input[0], scales[node.input[1]], rounded)
            changed = NodeProto()
            changed.CopyFrom(node)
            changed.input[0] = rounded
            node = changed
        result.append(node)
    return result


def _rounding(x: str, scales: str, y: str) -> list[NodeProto]:
    def node(op: str, inputs: list[str], output: str, **attributes: int | float) -> NodeProto:
        return helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes)

    return [
        node("Cast", [x], f"{y}.wide", to=TensorProto.FLOAT),
        node("Div", [f"{y}.wide", scales], f"{y}.quotients"),
        node("Constant", [], f"{y}.one", value_float=1.0),
        node("QuantizeLinear", [f"{y}.quotients", f"{y}.one"], f"{y}.codes", output_dtype=TensorProto.FLOAT8E4M3FN),
        node("DequantizeLinear", [f"{y}.codes", f"{y}.one"], f"{y}.steps"),
        node("Mul", [f"{y}.steps", scales], f"{y}.products"),
        node("CastLike", [f"{y}.products", x], y),
    ]


def _round_inside(
    model: onnx.ModelProto, node: NodeProto, body: FunctionProto, arrays: Mapping[str, np.ndarray]
) -> None:
    """Makes ``node`` one of an op that rounds what it multiplies with those of its inputs that ``arrays`` has scales of."""
    formals = {formal: actual for formal, actual in zip(body.input, node.input, strict=True) if actual in arrays}
    rounding = FunctionProto()
    rounding.CopyFrom(body)
    rounding.name = f"{body.name}Rounding{''.join(str(list(body.input).index(formal)) for formal in formals)}"
    rounding.input.extend(f"{formal}{_SCALES}" for formal in formals)
    inner = _rounded(body.node, {formal: f"{formal}{_SCALES}" for formal in formals})
    del rounding.node[:]
    rounding.node.extend(inner)
    if all(function.name != rounding.name for function in model.functions):
        model.functions.append(rounding)
    node.op_type = rounding.name
    node.input.extend(f"{actual}{_SCALES}" for actual in formals.values())
