"""Ops in whose bodies ranks exchange something: where no plugin stands for one, its body has to be in the graph before
collectives are looked for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import onnx
import onnx.inliner

from moecompiler.graph import DOMAIN, FUSED_COLLECTIVES


def inline_fused_collectives(
    model: onnx.ModelProto, stays: Callable[[onnx.NodeProto], bool] = lambda node: False
) -> onnx.ModelProto:
    """A copy of the model with the bodies of such nodes in their places, but where one ``stays``; nodes of a body are named after
    theirs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    bodies = {each.name: each for each in model.functions if each.domain == DOMAIN and each.name in FUSED_COLLECTIVES}
    gone = [node for node in result.graph.node if node.domain == DOMAIN and node.op_type in bodies and not stays(node)]
    if not gone:
        return result
    for node in gone:  # the inliner goes by names of ops
        node.op_type = f"{node.op_type}/inlined"
    for body in bodies.values():
        copy = result.functions.add()
        copy.CopyFrom(body)
        copy.name = f"{body.name}/inlined"
    names = {f"{name}/inlined": name for name in bodies}
    before = list(result.graph.node)
    inlined = onnx.inliner.inline_selected_functions(result, [(DOMAIN, name) for name in names])
    rest = iter(inlined.graph.node)
    for node in before:
        body = bodies.get(names.get(node.op_type, "")) if node.domain == DOMAIN else None
        for index, inner in enumerate(islice(rest, len(body.node) if body is not None else 1)):
            if body is not None:  # the inliner leaves them without a name
                inner.name = f"{node.name}.{inner.op_type}_{index}"
    return inlined
