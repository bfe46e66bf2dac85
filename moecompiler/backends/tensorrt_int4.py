"""INT4 codes that TensorRT itself would dequantize become int8 codes of the same numbers.

TensorRT 10.6 on an H100 builds engines of ``DequantizeLinear`` of INT4 that compute other numbers, in silence. It folds int8
codes with a scale for each row of a matrix into weights of the scales' type, and those are right. A block is such a row, if the
matrix is told otherwise: ``[rows, in]`` in blocks is ``[rows * blocks, block]`` in rows. Codes and scales are the same arrays,
and so is every product of the two. Nothing is given up in speed: TensorRT's own products with INT4 take longer than those with
float weights. The engine is larger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np
import onnx
from onnx import helper, numpy_helper

from moecompiler.errors import UserError
from moecompiler.graph import Program, weight_tensor
from moecompiler.weights import Recipe

NOTE = (
    "4-bit codes that no plugin reads are float weights of the engine: TensorRT (10.6) computes wrong numbers with INT4"
)


def widen_int4(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The program with int8 codes wherever a ``DequantizeLinear`` reads int4 weights ``[rows, in]``, and notes. Their scales are
    weights ``[rows]`` or ``[rows, blocks]``; or they are one number, repeated, which is then read itself.

    Raises: UserError where scales are neither, or they or codes are read elsewhere too.
    """
    found = [index for index, node in enumerate(program.model.graph.node) if _reads_int4(node, program.weights)]
    if not found:
        return program, ()
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    graph = model.graph
    readers = Counter(name for node in graph.node for name in node.input)
    repeated = _repeated(graph, program.weights)
    weights = dict(program.weights)
    for index in reversed(found):
        node = graph.node[index]
        codes, scales = node.input
        own = (codes,) if scales in repeated else (codes, scales)
        if any(name not in weights or readers[name] > 1 for name in own):
            raise UserError(
                f"{node.name}: TensorRT computes wrong numbers with INT4, and {codes} cannot be int8 instead"
            )
        del node.attribute[:]
        shape = weights[codes].shape
        if scales in repeated:
            node.input[1] = repeated[scales]
            weights[codes] = replace(weights[codes], dtype="int8")
            continue
        rows = prod(weights[scales].shape)
        node.attribute.append(helper.make_attribute("axis", 0))
        weights[codes] = replace(weights[codes], dtype="int8", shape=(rows, prod(shape) // rows))
        weights[scales] = replace(weights[scales], shape=(rows,))
        if rows != shape[0]:
            graph.initializer.append(numpy_helper.from_array(np.array(shape), f"{codes}.shape"))
            names = [f"{codes}.blocks", f"{codes}.shape"]
            reshape = helper.make_node("Reshape", names, node.output, f"{node.name}.Reshape")
            node.output[0] = names[0]
            graph.node.insert(index + 1, reshape)
    for tensor in graph.initializer:
        if (recipe := weights.get(tensor.name)) != program.weights.get(tensor.name) and recipe is not None:
            tensor.CopyFrom(weight_tensor(tensor.name, recipe))
    _drop_unread(graph, repeated)
    return Program(model, weights), (NOTE,)


def _reads_int4(node: onnx.NodeProto, weights: Mapping[str, Recipe]) -> bool:
    codes = weights.get(node.input[0]) if node.op_type == "DequantizeLinear" and len(node.input) == 2 else None
    return codes is not None and codes.dtype == "int4"


def _repeated(graph: onnx.GraphProto, weights: Mapping[str, Recipe]) -> dict[str, str]:
    """Values that are one number, repeated → that number's; of constants' it is put into the graph."""
    found = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Expand"}
    scales = {node.input[1] for node in graph.node if _reads_int4(node, weights)}
    for tensor in [each for each in graph.initializer if each.name in scales - set(weights)]:
        numbers = numpy_helper.to_array(tensor)
        if numbers.size and (numbers == numbers.flat[0]).all():
            found[tensor.name] = f"{tensor.name}.number"
            graph.initializer.append(numpy_helper.from_array(np.array(numbers.flat[0]), found[tensor.name]))
    return found


def _drop_unread(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Removes what makes these values, where nobody reads them."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    gone = set(names) - read
    for index in reversed(range(len(graph.node))):
        if gone.intersection(graph.node[index].output):
            del graph.node[index]
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name in gone:
            del graph.initializer[index]
