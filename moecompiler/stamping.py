"""One exported layer → all layers of a stage.

A Mixtral's layers are alike, and torch takes seconds to export one: it is asked for one layer, whose nodes are then stamped
once per layer with the layer's own names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto

from moecompiler.graph import module_of, output_of

Named = TypeVar("Named", NodeProto, TensorProto, ValueInfoProto)
Rename = Callable[[str], str]


def stamp_layers(model: onnx.ModelProto, layers: Sequence[int]) -> onnx.ModelProto:
    """``model`` holds the first of ``layers`` alone; the result holds them all, one after another.

    The residual stream enters a layer at the first operand of its first ``Add`` and leaves it as ``output_of(layer)``, or, on
    a stage without a head, as the graph's first output.
    """
    first = layers[0]
    module = f"model.layers.{first}"
    graph = model.graph
    inside = [node for node in graph.node if _is_within(module_of(node.name), module)]
    before, after = _around(graph.node, inside)
    entry = next(node for node in inside if node.op_type == "Add" and module_of(node.name) == module).input[0]
    produced = {name for node in inside for name in node.output}
    left = output_of(module)
    ends_stage = left not in produced
    exit_name = graph.output[0].name if ends_stage else left

    def renaming(index: int) -> Rename:
        layer = layers[index]
        inner = _layer_renaming(first, layer, produced)

        def rename(name: str) -> str:
            if name == entry:
                return output_of(f"model.layers.{layers[index - 1]}") if index else entry
            if name == exit_name:
                return exit_name if ends_stage and index == len(layers) - 1 else output_of(f"model.layers.{layer}")
            return inner(name)

        return rename

    stamps = [renaming(index) for index in range(len(layers))]
    last = exit_name if ends_stage else output_of(f"model.layers.{layers[-1]}")

    def leave(name: str) -> str:
        return last if name == exit_name else name

    result = onnx.ModelProto()
    result.CopyFrom(model)
    out = result.graph
    del out.node[:], out.input[:], out.output[:], out.initializer[:], out.value_info[:]
    out.node.extend(before)
    for rename in stamps:
        out.node.extend(_renamed_node(node, rename, module, rename(f"{module}.")[:-1]) for node in inside)
    out.node.extend(_renamed_node(node, leave, "", "") for node in after)
    for target, source in ((out.input, graph.input), (out.output, graph.output), (out.initializer, graph.initializer)):
        target.extend(_stamped(source, stamps, lambda name: _belongs(name, first)))
    inner_values = produced | {exit_name}
    out.value_info.extend(_stamped(graph.value_info, stamps, lambda name: name in inner_values))
    if ends_stage:
        boundary = graph.output[0].type
        for layer in layers[:-1]:
            out.value_info.append(ValueInfoProto(name=output_of(f"model.layers.{layer}"), type=boundary))
    return result


def _is_within(module: str, ancestor: str) -> bool:
    return module == ancestor or module.startswith(f"{ancestor}.")


def _belongs(name: str, layer: int) -> bool:
    """Whether a graph input, output or initializer is this layer's: a weight or a cache."""
    return name.startswith((f"model.layers.{layer}.", f"past_key_values.{layer}.", f"present.{layer}."))


def _around(nodes: Sequence[NodeProto], inside: list[NodeProto]) -> tuple[list[NodeProto], list[NodeProto]]:
    """The nodes before and after the layer's; the exporter traces in order, so the layer's stand together."""
    names = {node.name for node in inside}
    positions = [index for index, node in enumerate(nodes) if node.name in names]
    start, stop = positions[0], positions[-1] + 1
    foreign = [node for node in nodes[start:stop] if node.name not in names]
    return [*nodes[:start], *foreign], list(nodes[stop:])


def _layer_renaming(first: int, layer: int, produced: set[str]) -> Rename:
    """Weights, caches and boundaries carry their layer's number; other inner values get the layer as a prefix. The first layer
    keeps the exporter's names, because constants that it shares with the rest of the graph are among them."""

    def rename(name: str) -> str:
        for prefix in ("model.layers", "past_key_values", "present"):
            if name.startswith((f"{prefix}.{first}.", f"{prefix}.{first}/")):
                return f"{prefix}.{layer}{name[len(f'{prefix}.{first}') :]}"
        return f"model.layers.{layer}/{name}" if name in produced and layer != first else name

    return rename


def _renamed_node(node: NodeProto, rename: Rename, module: str, new_module: str) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = new_module + node.name[len(module) :]
    del copy.input[:], copy.output[:]
    copy.input.extend(rename(name) if name else "" for name in node.input)
    copy.output.extend(rename(name) if name else "" for name in node.output)
    return copy


def _stamped(items: Iterable[Named], stamps: list[Rename], is_layers: Callable[[str], bool]) -> list[Named]:
    """The items in order, those of the layer repeated layer by layer where the first of them stood."""
    items = list(items)
    mine = [item for item in items if is_layers(item.name)]
    result: list[Named] = []
    for item in items:
        if not is_layers(item.name):
            result.append(item)
        elif item is mine[0]:
            result += [_renamed(each, rename) for rename in stamps for each in mine]
    return result


def _renamed(item: Named, rename: Rename) -> Named:
    copy = type(item)()
    copy.CopyFrom(item)
    copy.name = rename(item.name)
    return copy
