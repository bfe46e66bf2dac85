"""What a program needs before ONNX Runtime's CPU provider runs it: program → program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from moecompiler.backends.fused_collectives import inline_fused_collectives
from moecompiler.backends.onnxruntime_operators import CUSTOM_OPS_DOMAIN
from moecompiler.graph import Program, is_collective
from moecompiler.weights import NUMPY_DTYPES, Recipe


def lower(program: Program) -> Program:
    """Collectives become onnxruntime-extensions' Python ops; bfloat16 is computed in float32, from bfloat16 weights (ONNX
    Runtime's CPU provider has hardly any bfloat16 kernel), and float16 stays."""
    model = inline_fused_collectives(program.model)
    _inline_literals(model, program.weights)
    _compute_bfloat16_as_float32(model)
    _call_python_for_collectives(model)
    return Program(model, {name: recipe for name, recipe in program.weights.items() if recipe.values is None})


def _inline_literals(model: onnx.ModelProto, weights: Mapping[str, Recipe]) -> None:
    """What is not the checkpoint's goes into the graph: ONNX Runtime's shape inference wants to see small integers."""
    for index, tensor in enumerate(model.graph.initializer):
        recipe = weights.get(tensor.name)
        if recipe is not None and recipe.values is not None:
            array = np.array(recipe.values, NUMPY_DTYPES[recipe.dtype]).reshape(recipe.shape)
            model.graph.initializer[index].CopyFrom(numpy_helper.from_array(array, tensor.name))


def _compute_bfloat16_as_float32(model: onnx.ModelProto) -> None:
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in (*graph.node, *(node for function in model.functions for node in function.node)):
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.t.data_type == TensorProto.BFLOAT16:
                attribute.t.CopyFrom(_as_float32(attribute.t))
    widened = {}
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_type != TensorProto.BFLOAT16:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            widened[tensor.name] = f"{tensor.name}/float32"
        else:
            graph.initializer[index].CopyFrom(_as_float32(tensor))
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = widened.get(name, name)
    casts = [
        helper.make_node("Cast", [name], [wide], name=f"{name}/Cast", to=TensorProto.FLOAT)
        for name, wide in widened.items()
    ]
    _set_nodes(model, [*casts, *graph.node])


def _as_float32(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name)


def _call_python_for_collectives(model: onnx.ModelProto) -> None:
    """Python ops take float32 and string attributes: float16 is cast around them, which also sums it in float32."""
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if not is_collective(node):
            nodes.append(node)
            continue
        (x,), (y,) = node.input, node.output
        group = ",".join(str(rank) for rank in helper.get_node_attr_value(node, "group"))
        half = types[x] == TensorProto.FLOAT16
        inner_x, inner_y = (f"{x}/float32", f"{y}/float32") if half else (x, y)
        if half:
            nodes.append(helper.make_node("Cast", [x], [inner_x], name=f"{node.name}.in", to=TensorProto.FLOAT))
        nodes.append(
            helper.make_node(node.op_type, [inner_x], [inner_y], name=node.name, domain=CUSTOM_OPS_DOMAIN, group=group)
        )
        if half:
            nodes.append(helper.make_node("Cast", [inner_y], [y], name=f"{node.name}.out", to=TensorProto.FLOAT16))
    if any(node.domain == CUSTOM_OPS_DOMAIN for node in nodes):
        model.opset_import.append(helper.make_opsetid(CUSTOM_OPS_DOMAIN, 1))
    _set_nodes(model, nodes)


def _set_nodes(model: onnx.ModelProto, nodes: Iterable[NodeProto]) -> None:
    kept = list(nodes)
    del model.graph.node[:]
    model.graph.node.extend(kept)
