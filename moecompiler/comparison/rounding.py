"""Graphs of float16 or bfloat16 as hardware computes them that has both: each operator in float32, its result rounded.

ONNX Runtime's CPU provider has few kernels for either. It computes float16 in float32 too, but leaves out the rounding in
between where it can, and bfloat16 engines here are lowered to float32 throughout: what it then gives is nearer to the truth
than any arithmetic in the narrow type, and nothing to hold a kernel against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
import onnx.inliner
from onnx import NodeProto, TensorProto, helper, numpy_helper

from moecompiler.graph import Program

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_WIDE = TensorProto.FLOAT


def rounding_everywhere(program: Program) -> Program:
    """The program with its functions inlined and every narrow tensor a float32 that the narrow type holds: its inputs and
    outputs are float32, weights are what they were."""
    model = onnx.inliner.inline_local_functions(program.model)
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*typed.input, *typed.output, *typed.value_info)
    narrow = {value.name: kind for value in values if (kind := value.type.tensor_type.elem_type) in _NARROW}
    narrow |= {tensor.name: tensor.data_type for tensor in model.graph.initializer if tensor.data_type in _NARROW}
    weights = {tensor.name for tensor in model.graph.initializer} & narrow.keys()
    nodes = [helper.make_node("Cast", [name], [f"{name}/wide"], to=_WIDE) for name in sorted(weights)]
    nodes += [each for node in model.graph.node for each in _wide_nodes(node, narrow, weights)]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in _NARROW:
            value.type.tensor_type.elem_type = _WIDE
    return Program(model, program.weights)


def _wide_nodes(node: NodeProto, narrow: Mapping[str, int], weights: set[str]) -> Iterator[NodeProto]:
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
    rounding = []
    for index, name in enumerate(node.output):
        if name in narrow:
            wide.output[index], rounded = f"{name}/exact", f"{name}/rounded"
            rounding.append(helper.make_node("Cast", [wide.output[index]], [rounded], to=narrow[name]))
            rounding.append(helper.make_node("Cast", [rounded], [name], to=_WIDE))
    yield wide
    yield from rounding
