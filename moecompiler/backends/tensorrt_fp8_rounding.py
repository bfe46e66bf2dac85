"""What experts' bodies round to E4M3 by a scale of 1, done in float32 by plain operators.

TensorRT 10.6 computes other numbers for this pair of ``QuantizeLinear`` and ``DequantizeLinear`` beside the quotients and
products by expert, even where the experts' weights are floats (perplexity 4.3% up where plugins and ONNX Runtime have 0.1%). The
pair in front of an attention's product, with the scale of all its input, is right and stays: TensorRT multiplies in FP8 there.

E4M3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022) has steps of an eighth of the power of two below a number, and
of 2^-9 below 2^-6; 448 is the largest. The power is found by four comparisons, halving the range of exponents each time. All of
it is exact, ties go to even as ``Round`` has them, and no step is one that a compiler could simplify.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

LARGEST = 448.0
_SMALLEST_STEP = 2.0**-9
_SMALLEST_EXPONENT = -6
_HALVINGS = (8, 4, 2, 1)  # of the 15 exponents from -6 to 8
_CONSTANTS = "round_e4m3"


def round_by_arithmetic(model: onnx.ModelProto) -> bool:
    """Replaces each pair of E4M3 codes by a float32 scale of 1, in place; whether there was any."""
    graph = model.graph
    ones = {tensor.name for tensor in graph.initializer if _is_one(tensor)}
    codes = {node.output[0]: node for node in graph.node if _makes_codes(node, ones)}
    read = [node for node in graph.node if node.input and node.input[0] in codes]
    pairs = {node.output[0]: node for node in read if node.op_type == "DequantizeLinear" and node.input[1] in ones}
    whole = {node.input[0] for node in pairs.values()} - {node.input[0] for node in read if node not in pairs.values()}
    if not whole:
        return False
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.output[0] in whole:
            continue
        if node.output[0] in pairs and node.input[0] in whole:
            nodes += _rounding(node.name, codes[node.input[0]].input[0], node.output[0])
        else:
            nodes.append(NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(_constants())
    return True


def _is_one(tensor: TensorProto) -> bool:
    if tensor.data_type != TensorProto.FLOAT or tensor.data_location == TensorProto.EXTERNAL or len(tensor.dims):
        return False
    return bool(numpy_helper.to_array(tensor) == 1)


def _makes_codes(node: NodeProto, ones: set[str]) -> bool:
    if node.op_type != "QuantizeLinear" or len(node.input) != 2 or node.input[1] not in ones:
        return False
    kinds = [each.i for each in node.attribute if each.name == "output_dtype"]
    return kinds == [TensorProto.FLOAT8E4M3FN]


def _constants() -> Iterator[TensorProto]:
    values = {"one": 1.0, "largest": LARGEST, "lowest": -LARGEST, "step": _SMALLEST_STEP}
    for halving in _HALVINGS:
        values |= {f"at_{halving}": 2.0 ** (halving + _SMALLEST_EXPONENT), f"power_{halving}": 2.0**halving}
    for name, value in values.items():
        yield numpy_helper.from_array(np.array(value, np.float32), f"{_CONSTANTS}/{name}")


def _rounding(name: str, x: str, y: str) -> Iterator[NodeProto]:
    """``y``: what E4M3 has nearest to ``x``."""
    count = 0

    def node(op: str, inputs: list[str], output: str) -> NodeProto:
        nonlocal count
        count += 1
        return helper.make_node(op, inputs, [output], f"{name}.{op}_{count}")

    def constant(of: str) -> str:
        return f"{_CONSTANTS}/{of}"

    clipped, size, power = f"{y}/clipped", f"{y}/size", constant("one")
    yield node("Clip", [x, constant("lowest"), constant("largest")], clipped)
    yield node("Abs", [clipped], size)
    for halving in _HALVINGS:  # ``size`` is the number over the powers found, ``power`` their product
        found, factor, rest, product = (f"{y}/{part}_{halving}" for part in ("found", "factor", "rest", "product"))
        yield node("GreaterOrEqual", [size, constant(f"at_{halving}")], found)
        yield node("Where", [found, constant(f"power_{halving}"), constant("one")], factor)
        yield node("Div", [size, factor], rest)
        yield node("Mul", [power, factor], product)
        size, power = rest, product
    yield node("Mul", [power, constant("step")], f"{y}/step")
    yield node("Div", [clipped, f"{y}/step"], f"{y}/steps")
    yield node("Round", [f"{y}/steps"], f"{y}/whole_steps")
    yield node("Mul", [f"{y}/whole_steps", f"{y}/step"], y)
