"""A graph as text: its nodes under the HF modules they come from, with types and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from moecompiler.graph import Program, module_of

_MOST_ELEMENTS = 8  # of a constant that is written out


def graph_text(program: Program) -> str:
    """Inputs, outputs, and every node in order; a line ``model.layers.0.mlp`` begins the nodes of that module."""
    graph = program.model.graph
    types = types_by_name(program.model)
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in program.weights}
    lines = [f"input {_typed(value.name, types)}" for value in graph.input]
    lines += [f"output {_typed(value.name, types)}" for value in graph.output]
    current = None
    for node in graph.node:
        module = module_of(node.name)
        if module != current:
            lines.append(module or "(no module)")
            current = module
        lines.append(f"  {node_text(node, types, constants)}")
    return "\n".join(lines) + "\n"


def types_by_name(model: onnx.ModelProto) -> dict[str, str]:
    """``float16[batch, 32]`` of every tensor whose type the file says."""
    graph = model.graph
    types = {value.name: _value_type(value) for value in (*graph.input, *graph.output, *graph.value_info)}
    return types | {tensor.name: tensor_type(tensor) for tensor in graph.initializer}


def tensor_type(tensor: TensorProto) -> str:
    """``float16[4, 32]`` of an initializer."""
    return _type(tensor.data_type, tensor.dims)


def node_text(node: NodeProto, types: dict[str, str], constants: dict[str, TensorProto]) -> str:
    """``name: out type = domain::Op<attributes>(inputs)``; small constants are written out."""
    inputs = ", ".join(_constant(constants[name]) if name in constants else name for name in node.input)
    outputs = ", ".join(_typed(name, types) for name in node.output if name)
    attributes = ", ".join(f"{each.name}={_attribute(each)}" for each in sorted(node.attribute, key=lambda a: a.name))
    op = op_of(node)
    return f"{node.name.rpartition('/')[2]}: {outputs} = {op}{f'<{attributes}>' if attributes else ''}({inputs})"


def _typed(name: str, types: dict[str, str]) -> str:
    return f"{name} {types[name]}" if name in types else name


def _value_type(value: ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in tensor.shape.dim]
    return _type(tensor.elem_type, dims if tensor.HasField("shape") else ["..."])


def _type(code: int, dims: Iterable[object]) -> str:
    return f"{TensorProto.DataType.Name(code).lower()}[{', '.join(map(str, dims))}]"


def op_of(node: NodeProto) -> str:
    """``moecompiler::MoE``; a standard operator's name alone."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def is_written_out(tensor: TensorProto) -> bool:
    """Whether a constant is small enough for its values to stand where it is read."""
    return tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= _MOST_ELEMENTS


def _constant(tensor: TensorProto) -> str:
    return str(numpy_helper.to_array(tensor).tolist()) if is_written_out(tensor) else tensor.name


def _attribute(attribute: AttributeProto) -> str:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return _constant(value)
    if isinstance(value, GraphProto):
        return f"{{{len(value.node)} nodes}}"
    return value.decode() if isinstance(value, bytes) else str(value)
