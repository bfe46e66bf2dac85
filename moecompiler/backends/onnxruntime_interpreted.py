"""Plugins without a GPU: nodes of a program become operators that call Triton's interpreter. Pure: program in, program out.

The kernels are those that a GPU runs, by the same plans, in the node's own type: what comes to a node as float32, because ONNX
Runtime computes bfloat16 so, is rounded to that type before a kernel sees it, and its results are widened again, which is exact.
An output that a plugin writes in place of an input, a cache's, begins as a copy of it. Weights of experts, codes and their scales
stay in the engine's weight file, from where the interpreting process maps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper

from moecompiler.backends.base import PluginLibrary
from moecompiler.backends.interpreted_node import INTERPRETED_SM, FileWeight, InterpretedNode
from moecompiler.backends.onnxruntime_operators import FILE, NODE, PLUGINS_DOMAIN, plugin_operator
from moecompiler.backends.tensorrt_program import known_shapes
from moecompiler.errors import UserError
from moecompiler.graph import COLLECTIVES, DOMAIN, FUSED_COLLECTIVES, Program
from moecompiler.plugin_switches import Mode, PluginSwitches
from moecompiler.weights import FLOATS, Recipe

# what ONNX Runtime computes in float32, once the program is lowered
_WIDE = (TensorProto.FLOAT, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Interpreted:
    """``program``: with operators in place of nodes, of which ``plugins`` gives the ops and ``tactics`` the plans, by the node's
    name. Weights that only they read have recipes and no initializer."""

    program: Program
    plugins: Mapping[str, str]
    tactics: Mapping[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What an engine's record says."""
        return {
            "interpreted_sm": INTERPRETED_SM,
            "plugins": dict(self.plugins),
            "tactics": dict(self.tactics),
            "notes": list(self.notes),
        }


def interpret_plugins(
    program: Program,
    switches: PluginSwitches,
    dtype: str,
    library: PluginLibrary,
    weights_file: str,
    tactics: Sequence[str] = (),
) -> Interpreted:
    """Makes operators of the nodes for which ``switches`` insist on a plugin; the others keep their bodies. ``dtype``: the
    graph's floating-point type. ``tactics``: names of plans; a node has its op's first that is among them, else its first.

    Raises: UserError where a plugin is insisted on and there is none that fits, or a tactic is of no op in the graph.
    """
    model = onnx.shape_inference.infer_shapes(program.model, data_prop=True)
    chosen, notes = _choose(model, switches, dtype, library)
    _check_tactics(tactics, chosen)
    chosen_tactics = {
        name: next((each for each in names if each in tactics), names[0]) for name, names in chosen.items()
    }
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    nodes: list[NodeProto] = []
    for node in program.model.graph.node:
        if node.name in chosen:
            before, node = _added_up(node, types)
            nodes += before
            nodes += _operator(node, types, program.weights, dtype, chosen_tactics[node.name], weights_file)
        else:
            nodes.append(node)
    plugins = {node.name: node.op_type for node in program.model.graph.node if node.name in chosen}
    return Interpreted(Program(_with_nodes(program, nodes), program.weights), plugins, chosen_tactics, tuple(notes))


def _choose(
    model: onnx.ModelProto, switches: PluginSwitches, dtype: str, library: PluginLibrary
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The nodes that are to be plugins, with the names of their tactics, and notes."""
    ours = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type not in COLLECTIVES]
    if not ours:
        raise UserError(f"--plugins {switches}: the graph has no fused ops; compile with --pipeline plugins")
    shapes = known_shapes(model)
    chosen: dict[str, tuple[str, ...]] = {}
    for node in ours:
        if switches.mode(node.op_type, node.name) is not Mode.ON:
            continue
        unknown = [name for name in node.input if name not in shapes]
        if unknown:
            refusal: str | None = f"the shape of its input {unknown[0]} is not known"
        else:
            dims = tuple(shapes[name] for name in node.input)
            refusal = library.refusal(node, dims, dtype, INTERPRETED_SM)
        if refusal is not None:
            raise UserError(f"--plugins {switches}: {node.name} ({node.op_type}) cannot be a plugin: {refusal}")
        chosen[node.name] = library.tactics(node, dims, dtype, INTERPRETED_SM)
    unused = switches.unused((node.op_type, node.name) for node in ours)
    return chosen, [f"--plugins {rule} fits no node of the graph" for rule in unused]


def _check_tactics(wanted: Sequence[str], chosen: Mapping[str, tuple[str, ...]]) -> None:
    there = dict.fromkeys(name for names in chosen.values() for name in names)
    for name in wanted:
        if name not in there:
            raise UserError(f"--plugin_tactics {name}: no plugin of the graph has it; there are {', '.join(there)}")


def _added_up(node: NodeProto, types: dict[str, int]) -> tuple[list[NodeProto], NodeProto]:
    """An op before whose own work ranks exchange something: the exchange, and the op that is left. ``types`` gets what is between
    them."""
    if node.op_type not in FUSED_COLLECTIVES:
        return [], node
    rest = NodeProto()
    rest.CopyFrom(node)
    branch, total = node.input[1], f"{node.name}.total"
    types[total] = types[branch]
    rest.input[1], rest.op_type = total, node.op_type.removeprefix("AllReduce")
    (group,) = (each for each in rest.attribute if each.name == "group")
    rest.attribute.remove(group)
    exchange = helper.make_node("AllReduce", [branch], [total], name=f"{node.name}.AllReduce", domain=DOMAIN)
    exchange.attribute.append(group)
    return [exchange], rest


def _operator(
    node: NodeProto,
    types: Mapping[str, int],
    weights: Mapping[str, Recipe],
    dtype: str,
    tactic: str,
    weights_file: str,
) -> list[NodeProto]:
    """The node's operator, and casts around it: it takes and gives float32."""
    from_file: dict[int, FileWeight] = {}
    before: list[NodeProto] = []
    after: list[NodeProto] = []
    inputs: list[str] = []
    outputs: list[str] = []
    for index, name in enumerate(node.input):
        recipe = weights.get(name)
        if recipe is not None and _stays_in_file(recipe):
            from_file[index] = FileWeight(name, recipe.dtype, recipe.shape)
        elif types[name] not in _WIDE:
            inputs.append(
                f"{name}/{node.name}.in_{index}"
            )  # of a router: sessions that count tokens know it by its beginning
            before.append(_cast(name, inputs[-1], TensorProto.FLOAT, f"{node.name}.in_{index}"))
        else:
            inputs.append(name)
    for index, name in enumerate(node.output):
        wide = types[name] in _WIDE
        outputs.append(name if wide else f"{node.name}.out_{index}")
        if not wide:
            after.append(_cast(outputs[-1], name, types[name], f"{node.name}.out_{index}"))
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    operator = helper.make_node(
        plugin_operator(len(inputs), len(outputs)),
        inputs,
        outputs,
        name=node.name,
        domain=PLUGINS_DOMAIN,
        **{
            NODE: InterpretedNode(node.name, node.op_type, attributes, dtype, tactic, from_file).to_json(),
            FILE: weights_file if from_file else "",
        },
    )
    return [*before, operator, *after]


def _stays_in_file(recipe: Recipe) -> bool:
    """Not what is small: vectors and the router, which sessions that count tokens read too."""
    small = recipe.dtype in FLOATS and len(recipe.shape) <= 2 and recipe.quantized is None
    return recipe.values is None and not small


def _cast(source: str, target: str, to: int, name: str) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=name, to=to)


def _with_nodes(program: Program, nodes: Sequence[NodeProto]) -> onnx.ModelProto:
    """The program's model with other nodes, without initializers that none of them reads."""
    read = {name for node in nodes for name in node.input}
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read or tensor.name not in program.weights]
    kept = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if not any(each.domain == PLUGINS_DOMAIN for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(PLUGINS_DOMAIN, 1))
    return model
