"""Small graphs for tests of passes: written as text, run through a pass, and compared with another text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from moecompiler.graph import Program, weight_tensor
from moecompiler.pipeline import Pass, apply
from moecompiler.weights import Recipe, TensorReader, materialize
from moecompiler.weights import whole as whole_tensor

HEADER = '<ir_version: 10, opset_import: ["" : 21, "moecompiler" : 1]>'


def program(text: str, weights: Mapping[str, Recipe] | None = None) -> Program:
    """``name (inputs) => (outputs) <initializers> { ["node"] y = Op (x) }``, and initializers for the weights."""
    model = onnx.parser.parse_model(HEADER + text)
    weights = dict(weights or {})
    model.graph.initializer.extend(weight_tensor(name, recipe) for name, recipe in weights.items())
    return Program(onnx.shape_inference.infer_shapes(model, data_prop=True), weights)


def whole(name: str, *shape: int, dtype: str = "float32") -> Recipe:
    """The recipe of all of a checkpoint's tensor."""
    return whole_tensor(name, dtype, shape)


def facts(it: Program) -> dict[str, Any]:
    """All of a program that a pass may change, in a form that compares and prints well."""
    graph = it.model.graph

    def typed(value: onnx.ValueInfoProto) -> tuple[str, int, list[Any]]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]

    def attribute(value: onnx.AttributeProto) -> Any:
        held = helper.get_attribute_value(value)
        return constant(held) if isinstance(held, TensorProto) else held

    def constant(tensor: TensorProto) -> Any:
        if tensor.data_location == TensorProto.EXTERNAL:
            return "weight", tensor.data_type, list(tensor.dims)
        return tensor.data_type, numpy_helper.to_array(tensor).tolist()

    return {
        "inputs": [typed(value) for value in graph.input],
        "outputs": [typed(value) for value in graph.output],
        "nodes": [
            f"{n.name}: {', '.join(n.output)} = {n.domain or 'onnx'}.{n.op_type}({', '.join(n.input)})"
            f" { ({a.name: attribute(a) for a in sorted(n.attribute, key=lambda a: a.name)} or '') }"
            for n in graph.node
        ],
        "initializers": {tensor.name: constant(tensor) for tensor in graph.initializer},
        "weights": dict(it.weights),
    }


def check_pass(step: Pass, before: Program, after: Program, changed: list[str]) -> None:
    """Runs the pass, and shows that it makes ``after`` of ``before`` and says ``changed`` (what and node); that it leaves its
    argument alone, writes the same bytes each time, and finds nothing more to do in what it made."""
    original = before.model.SerializeToString(deterministic=True), dict(before.weights)
    made, result = apply(step, before)
    assert facts(made) == facts(after)
    assert sorted(f"{change.what}: {change.node}" for change in result.changes) == sorted(changed)
    assert (result.nodes_before, result.nodes_after) == (len(before.model.graph.node), len(made.model.graph.node))
    assert (before.model.SerializeToString(deterministic=True), dict(before.weights)) == original
    again, _ = apply(step, before)
    assert again.model.SerializeToString(deterministic=True) == made.model.SerializeToString(deterministic=True)
    settled, nothing = apply(step, made)
    assert nothing.changes == ()
    assert facts(settled) == facts(made)


def run(it: Program, feeds: Mapping[str, np.ndarray], reader: TensorReader | None = None) -> list[np.ndarray]:
    """The outputs by ONNX Runtime, as it computes the graph without optimizing it."""
    model = onnx.ModelProto()
    model.CopyFrom(it.model)
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name in it.weights:
            assert reader is not None
            array = materialize(it.weights[tensor.name], reader)
            model.graph.initializer[index].CopyFrom(numpy_helper.from_array(array, tensor.name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return list(session.run(None, dict(feeds)))
