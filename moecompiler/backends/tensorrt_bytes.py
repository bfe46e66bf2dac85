"""A KV cache of codes that plain operators read and write, as TensorRT takes it: unsigned bytes.

TensorRT 10.6 takes INT8 from outside only into ``DequantizeLinear``, and then counts it as quantization, which it refuses
beside FP8 weights. UINT8 it takes into and out of ``Cast`` to and from FLOAT (``NvInfer.h``, ``DataType::kUINT8``), whatever
else is in the network, on any GPU. In memory a code is the same byte either way, so caches that plugins read stay INT8.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from moecompiler.weights import NUMPY_DTYPES

_NUMBERS = {"half": 128.0, "whole": 256.0, "zero": 0.0}  # of a byte: from where on its sign is set, and how far that is
_PREFIX = "cache_bytes"


def unsigned_caches(model: onnx.ModelProto) -> list[str]:
    """In place: inputs that are read as numbers by ``Cast`` or ``CastLike`` alone, and outputs that ``Cast`` writes, become UINT8
    where they are INT8. Gives their names. ``model`` without functions."""
    graph = model.graph
    taken = {value.name: value for value in graph.input if _is_int8(value) and _only_cast(graph, value.name)}
    casts = {node.output[0] for node in graph.node if node.op_type == "Cast"}
    given = {value.name: value for value in graph.output if _is_int8(value) and value.name in casts}
    nodes = [each for name in taken for each in _signed(name)]
    for node in graph.node:
        copy = NodeProto.FromString(node.SerializeToString())
        if node.op_type == "Cast" and node.output[0] in given:
            nodes.extend(_unsigned(copy))
            continue
        for index, name in enumerate(node.input):
            if name in taken:
                copy.input[index] = _inner(name, "signed")
        nodes.append(copy)
    changed = [*taken.values(), *given.values()]
    for value in changed:
        value.type.tensor_type.elem_type = TensorProto.UINT8
    if changed:
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(
            numpy_helper.from_array(NUMPY_DTYPES["float32"].type(number), _inner("", name))
            for name, number in _NUMBERS.items()
        )
    return [value.name for value in changed]


def _is_int8(value: ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.INT8)


def _only_cast(graph: onnx.GraphProto, name: str) -> bool:
    readers = [node for node in graph.node if name in node.input]
    return bool(readers) and all(
        node.op_type in ("Cast", "CastLike") and list(node.input).index(name) == 0 and name not in node.input[1:]
        for node in readers
    )


def _signed(name: str) -> Iterator[NodeProto]:
    """From bytes, 0 to 255, to float32 numbers from -128 to 127."""
    wide, small, below = (_inner(name, part) for part in ("wide", "is_small", "below"))
    yield _node("Cast", [name], wide, to=TensorProto.FLOAT)
    yield _node("Less", [wide, _inner("", "half")], small)
    yield _node("Sub", [wide, _inner("", "whole")], below)
    yield _node("Where", [small, wide, below], _inner(name, "signed"))


def _unsigned(cast: NodeProto) -> Iterator[NodeProto]:
    """The other way, for what ``cast`` made INT8 of."""
    name = cast.output[0]
    wide, negative, above, byte = (_inner(name, part) for part in ("wide", "is_negative", "above", "unsigned"))
    yield _node("Cast", [cast.input[0]], wide, to=TensorProto.FLOAT)
    yield _node("Less", [wide, _inner("", "zero")], negative)
    yield _node("Add", [wide, _inner("", "whole")], above)
    yield _node("Where", [negative, above, wide], byte)
    yield helper.make_node("Cast", [byte], [name], name=cast.name, to=TensorProto.UINT8)


def _inner(name: str, part: str) -> str:
    return f"{_PREFIX}/{name}/{part}" if name else f"{_PREFIX}/{part}"


def _node(op: str, inputs: list[str], output: str, **attributes: int) -> NodeProto:
    return helper.make_node(op, inputs, [output], name=output, **attributes)
