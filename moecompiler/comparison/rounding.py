"""Graphs of float16 or bfloat16 as hardware computes them that has both: each operator in float32, its result rounded.

ONNX Runtime's CPU provider has few kernels for either. It computes float16 in float32 too, but leaves out the rounding in
between where it can, and bfloat16 engines here are lowered to float32 throughout: what it then gives is nearer to the truth
than any arithmetic in the narrow type, and nothing to hold a kernel against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx.inliner
from onnx import NodeProto, TensorProto, helper, numpy_helper

from moecompiler.backends.onnxruntime_lowering import lower
from moecompiler.graph import Program

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_WIDE = TensorProto.FLOAT


def lower_with_rounding(program: Program, *, outputs: bool = True) -> Program:
    """``lower``, with functions inlined and every narrow tensor a float32 that the narrow type holds: inputs and outputs are
    float32, weights are what they were. ``outputs``: the graph's are rounded too."""
    model = onnx.inliner.inline_local_functions(program.model)
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*typed.input, *typed.output, *typed.value_info)
    narrow = {value.name: kind for value in values if (kind := value.type.tensor_type.elem_type) in _NARROW}
    weights = {tensor.name for tensor in model.graph.initializer if tensor.data_type in _NARROW}
    nodes = [helper.make_node("Cast", [name], [f"{name}/wide"], f"{name}/wide", to=_WIDE) for name in sorted(weights)]
    _set_nodes(model, [*nodes, *(_wide(node, weights) for node in model.graph.node)])
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type in _NARROW:
            value.type.tensor_type.elem_type = _WIDE
    lowered = lower(Program(model, program.weights))
    if not outputs:
        narrow = {name: kind for name, kind in narrow.items() if name not in {v.name for v in model.graph.output}}
    # lowering makes float32 of casts to bfloat16 too, so rounding comes last
    _set_nodes(lowered.model, [each for node in lowered.model.graph.node for each in _rounded(node, narrow)])
    return lowered


def _wide(node: NodeProto, weights: set[str]) -> NodeProto:
    """With what it reads and writes in float32."""
    wide = NodeProto()
    wide.CopyFrom(node)
    for index, name in enumerate(node.input):
        if name in weights:
            wide.input[index] = f"{name}/wide"
    for attribute in wide.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _NARROW:
            attribute.i = _WIDE
        if attribute.t.data_type in _NARROW:
            array = numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
    return wide


def _rounded(node: NodeProto, narrow: Mapping[str, int]) -> list[NodeProto]:
    """A node, and the rounding of its outputs."""
    exact = NodeProto()
    exact.CopyFrom(node)
    nodes = [exact]
    for index, name in enumerate(node.output):
        if name in narrow:
            exact.output[index], rounded = f"{name}/exact", f"{name}/rounded"
            nodes.append(helper.make_node("Cast", [exact.output[index]], [rounded], to=narrow[name]))
            nodes.append(helper.make_node("Cast", [rounded], [name], to=_WIDE))
    return nodes


def _set_nodes(model: onnx.ModelProto, nodes: Sequence[NodeProto]) -> None:
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
