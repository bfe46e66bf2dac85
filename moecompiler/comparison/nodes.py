"""Nodes of ops of ours, each as a program of its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx
from onnx import helper, numpy_helper

from moecompiler.cutting import cut
from moecompiler.graph import DOMAIN, ONNX_DTYPES, Program, is_collective, module_of
from moecompiler.materializing import Materializer
from moecompiler.plugin_switches import FAMILIES
from moecompiler.validation.place import Arrays
from moecompiler.weights import Recipe

_LAYER = re.compile(r"model\.layers\.(\d+)(?:\.|/|$)")
_DTYPES = {code: name for name, code in ONNX_DTYPES.items()}


@dataclass(frozen=True)
class OpNode:
    """A node alone. ``program``: its inputs that are no weights, and a router, are the graph's inputs. ``inputs`` and
    ``outputs``: what the op calls them → what the graph does; ``types``: by the graph's names, of all of these, as ONNX calls
    them in lower case; ``router``: its recipe, where the op has one."""

    name: str
    op: str
    program: Program
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    types: Mapping[str, str]
    router: Recipe | None

    @property
    def module(self) -> str:
        return module_of(self.name)

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    @property
    def dtype(self) -> str:
        """The op's own floating-point type: that of its first input."""
        return self.types[next(iter(self.inputs.values()))]

    @property
    def fed(self) -> dict[str, str]:
        """Inputs of the program: what the op calls them → what the graph does."""
        given = {value.name for value in self.program.model.graph.input}
        return {name: tensor for name, tensor in self.inputs.items() if tensor in given}


def layer_of(name: str) -> int | None:
    """The layer that a module, node or tensor is named after."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def family_of(op: str) -> str | None:
    """What ``--plugins`` calls an op."""
    return next((family for family, names in FAMILIES.items() if op.startswith(names)), None)


def is_op_node(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and not is_collective(node)


def select(
    model: onnx.ModelProto, layers: Collection[int] | None = None, ops: Collection[str] | None = None
) -> list[onnx.NodeProto]:
    """The nodes of ops of ours in the graph's order; of ``layers`` (None: of all, and of none), and of ``ops``, families or
    names in lower case (None: of all)."""
    return [
        node
        for node in model.graph.node
        if is_op_node(node)
        and (layers is None or layer_of(node.name) in layers)
        and (ops is None or node.op_type.lower() in ops or family_of(node.op_type) in ops)
    ]


def op_node(program: Program, node: onnx.NodeProto) -> OpNode:
    """A node of the program alone. Raises: KeyError where the file does not say a tensor's type, or holds no body of the op."""
    function = next(f for f in program.model.functions if (f.domain, f.name) == (node.domain, node.op_type))
    part = cut(program.model, list(node.output), stops=set(node.input))
    inputs = dict(zip(function.input, node.input, strict=True))
    router = inputs.get("router")
    recipe = program.weights.get(router) if router is not None else None
    if router is not None and recipe is not None:
        make_input(part, router)
    kept = {tensor.name for tensor in part.graph.initializer}
    values = (*part.graph.input, *part.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in part.graph.initializer}
    functions = [each for each in part.functions if (each.domain, each.name) == (function.domain, function.name)]
    del part.functions[:]
    part.functions.extend(functions)
    return OpNode(
        node.name,
        node.op_type,
        Program(part, {name: each for name, each in program.weights.items() if name in kept}),
        inputs,
        dict(zip(function.output, node.output, strict=True)),
        {name: _DTYPES[code] for name, code in types.items()},
        recipe,
    )


def weights_of(node: OpNode, tensors: Materializer) -> Arrays:
    """The node's inputs that are weights or constants, by the op's names: int4 one to a byte, types that numpy lacks by
    ml_dtypes."""
    constants = {tensor.name: tensor for tensor in node.program.model.graph.initializer}
    recipes = node.program.weights
    return {
        name: tensors.tensor(recipes[tensor]) if tensor in recipes else numpy_helper.to_array(constants[tensor])
        for name, tensor in node.inputs.items()
        if tensor in constants
    }


def make_input(model: onnx.ModelProto, name: str) -> None:
    """An initializer becomes an input of the graph."""
    index = next(i for i, tensor in enumerate(model.graph.initializer) if tensor.name == name)
    tensor = model.graph.initializer[index]
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    del model.graph.initializer[index]


def as_the_op_says(node: OpNode) -> onnx.ModelProto:
    """The node's model with inputs and outputs called as the op calls them, of any sizes, and no weights: the same for every
    node of an op with the same attributes."""
    (own,) = node.program.model.graph.node
    renamed = onnx.NodeProto()
    renamed.CopyFrom(own)
    renamed.name = own.op_type
    renamed.input[:] = list(node.inputs)
    renamed.output[:] = list(node.outputs)
    infos = [
        [helper.make_tensor_value_info(name, ONNX_DTYPES[node.types[tensor]], None) for name, tensor in side.items()]
        for side in (node.inputs, node.outputs)
    ]
    graph = helper.make_graph([renamed], own.op_type, *infos)
    given = node.program.model
    model = helper.make_model(graph, opset_imports=list(given.opset_import), ir_version=given.ir_version)
    model.functions.extend(given.functions)
    return model
