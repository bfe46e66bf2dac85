"""Programs of one op of ours, or of a chain of them: what its kernels are tried and timed on inside engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import TensorProto, helper

from moecompiler.backends.tensorrt_program import AS_BYTES
from moecompiler.graph import DOMAIN, IR_VERSION, ONNX_DTYPES, OPSET, Program
from moecompiler.ops import OpSpec, Value, add_function


def dims_of(value: Value) -> tuple[str, ...]:
    """Names of a value's dims; the leading ones of any number become batch and sequence."""
    return ("batch", "sequence", *value.dims[1:]) if value.dims[0] == "..." else value.dims


def one_node(spec: OpSpec, attributes: Mapping[str, Any], sizes: Mapping[str, int], dtype: str) -> Program:
    """A node of ``spec``, its inputs and outputs the graph's; dims that are not in ``sizes`` are free."""
    return chain(spec, attributes, sizes, dtype, 1)


def chain(spec: OpSpec, attributes: Mapping[str, Any], sizes: Mapping[str, int], dtype: str, length: int) -> Program:
    """``length`` nodes, the first input of each the first output of the one before; the others are the graph's."""

    def info(value: Value) -> onnx.ValueInfoProto:
        known = [int(dim) if dim.isdigit() else sizes.get(dim, dim) for dim in dims_of(value)]
        return helper.make_tensor_value_info(value.name, ONNX_DTYPES[dtype if value.type == "T" else value.type], known)

    inputs, outputs = ([value.name for value in values] for values in (spec.inputs, spec.outputs))
    nodes = []
    for index in range(length):
        last = index == length - 1
        given = [f"{outputs[0]}.{index - 1}", *inputs[1:]] if index else inputs
        made = outputs if last else [f"{name}.{index}" for name in outputs]
        name = f"model/{spec.name}" if length == 1 else f"model/{spec.name}_{index}"
        nodes.append(helper.make_node(spec.name, given, made, name, domain=DOMAIN, **attributes))
    graph = helper.make_graph(nodes, "g", [info(v) for v in spec.inputs], [info(v) for v in spec.outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    add_function(model, spec)
    return Program(model)


def take_codes_as_bytes(model: onnx.ModelProto) -> None:
    """Inputs and outputs of types that plugins get as bytes become int8, two of int4 in one, as the backend holds weights."""
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        if kind.elem_type not in AS_BYTES:
            continue
        if kind.elem_type == TensorProto.INT4:
            kind.shape.dim[-1].dim_value //= 2
        kind.elem_type = TensorProto.INT8


def profile(
    spec: OpSpec, sizes: Mapping[str, int], bounds: tuple[Mapping[str, int], Mapping[str, int], Mapping[str, int]]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """The least, the typical and the largest shape of every input with a free dim, whose sizes ``bounds`` gives."""
    result = {}
    for value in spec.inputs:
        least, typical, largest = (
            tuple(int(dim) if dim.isdigit() else {**sizes, **free}[dim] for dim in dims_of(value)) for free in bounds
        )
        if any(not dim.isdigit() and dim not in sizes for dim in dims_of(value)):
            result[value.name] = (least, typical, largest)
    return result
