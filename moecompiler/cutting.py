"""Parts of a graph by themselves: what computes some of its tensors from others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx
from onnx import helper


def cut(model: onnx.ModelProto, outputs: Sequence[str], stops: Collection[str]) -> onnx.ModelProto:
    """The subgraph that computes ``outputs`` from graph inputs, initializers and the tensors ``stops``.

    A graph cut off at a tensor tells what that tensor is without marking it as an output of the whole, which would change
    what a backend fuses. Raises: KeyError where the type of a tensor at the border is not in the file.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output if name}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    kinds = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    inputs: set[str] = set()
    needed: set[str] = set()
    waiting, seen = list(outputs), set(outputs)
    while waiting:
        name = waiting.pop()
        if name in initializers:
            needed.add(name)
        elif name not in producers or (name in stops and name not in outputs):
            inputs.add(name)
        else:
            for each in producers[name].input:
                if each and each not in seen:
                    seen.add(each)
                    waiting.append(each)
    inner = seen - inputs
    kept = [node for node in graph.node if any(name in inner for name in node.output)]
    part = helper.make_graph(
        kept,
        f"part {' '.join(outputs)}",
        [kinds[name] for name in sorted(inputs)],
        [kinds[name] for name in outputs],
        [initializers[name] for name in sorted(needed)],
        value_info=[value for value in graph.value_info if value.name in inner and value.name not in outputs],
    )
    result = helper.make_model(part, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    result.functions.extend(model.functions)
    return result
