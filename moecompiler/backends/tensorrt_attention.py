"""ONNX's own ``Attention`` as the parsers of TensorRT-RTX and of TensorRT 10.15 and later take it."""

from __future__ import annotations

import onnx
from onnx import AttributeProto, helper


def adapt_attention(model: onnx.ModelProto) -> None:
    """In place. The parser refuses ``softmax_precision``. Where there is no fused kernel (float32 with several tokens, one token
    with fewer than four query heads) attention has to be allowed to fall apart into plain layers."""
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and node.op_type == "Attention":
            kept = [each for each in node.attribute if each.name != "softmax_precision"]
            copies = [AttributeProto.FromString(each.SerializeToString()) for each in kept]
            del node.attribute[:]
            node.attribute.extend([*copies, helper.make_attribute("TRT_decomposable", 1)])


def caches_in_place(model: onnx.ModelProto) -> dict[str, str]:
    """Outputs of the graph that ``TensorScatter`` writes over an input of the graph: output → input."""
    inputs, outputs = ({value.name for value in values} for values in (model.graph.input, model.graph.output))
    return {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "TensorScatter" and node.output[0] in outputs and node.input[0] in inputs
    }
