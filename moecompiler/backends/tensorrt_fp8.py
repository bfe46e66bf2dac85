"""FP8 experts that TensorRT itself would dequantize become the float weights that their codes stand for.

Without plugins TensorRT 10.6 on an H100 gave FP8 experts other numbers than their codes make (perplexity 3.2% up where ONNX
Runtime has 0.1%). What it rounds their input to was wrong (``tensorrt_fp8_rounding``); whether their weights were too was not
found out. Their products are those of floats anyway, for each expert rounds its input by a scale of its own; so weights are
dequantized before TensorRT sees them, which is what it does with int8. FP8 weights ``[out, in]`` of one matrix stay: with those
it computes right, in FP8.
"""

from __future__ import annotations

from dataclasses import replace

import onnx

from moecompiler.graph import Program, weight_tensor
from moecompiler.weights import Part, Recipe

NOTE = "FP8 experts that no plugin reads are float weights of the engine: TensorRT (10.6) was found wrong with FP8 ones"


def widen_fp8_experts(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The program with a float weight in place of each ``DequantizeLinear`` of FP8 codes of experts, bit for bit its result, and
    notes."""
    made = {node.output[0]: recipe for node in program.model.graph.node if (recipe := _numbers(node, program))}
    if not made:
        return program, ()
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    graph = model.graph
    for index in reversed(range(len(graph.node))):
        if graph.node[index].op_type == "DequantizeLinear" and graph.node[index].output[0] in made:
            del graph.node[index]
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name in program.weights.keys() - read:
            del graph.initializer[index]
    graph.initializer.extend(weight_tensor(name, recipe) for name, recipe in made.items())
    weights = {name: recipe for name, recipe in program.weights.items() if name in read}
    return Program(model, weights | made), (NOTE,)


def _numbers(node: onnx.NodeProto, program: Program) -> Recipe | None:
    """What a node dequantizes, where that is experts' FP8 codes by the scales made with them."""
    if node.op_type != "DequantizeLinear" or len(node.input) != 2:
        return None
    codes, scales = (program.weights.get(name) for name in node.input)
    if codes is None or scales is None or codes.quantized is None or scales.quantized is None:
        return None
    if codes.dtype != "float8_e4m3fn" or len(codes.quantized.source.shape) != 3:
        return None
    if replace(scales.quantized, part=Part.CODES) != codes.quantized:
        return None
    return Recipe(scales.dtype, codes.shape, quantized=replace(codes.quantized, part=Part.WEIGHT))
