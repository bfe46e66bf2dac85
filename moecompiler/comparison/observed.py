"""What of a rank's program is looked at: the tensors that leave its modules, and how its routers choose.

Watched tensors are made outputs of a program of its own, never of the engine that is measured, where that would change what the
backend fuses. How near the two are is measured too: ``layer_level`` says by how much their logits differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from moecompiler.comparison.nodes import is_op_node, layer_of
from moecompiler.graph import Program, output_of
from moecompiler.weights import Recipe

_WATCHED = re.compile(r"model\.embed_tokens|model\.layers\.\d+(?:\.self_attn|\.mlp)?")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")


@dataclass(frozen=True)
class RouterTap:
    """Where a layer's routing is read: the tensor of its logits, or, where a fused op routes (``router``: its recipe), of the
    tokens ``[tokens, hidden]`` that it gets. ``rounds``: the op's body runs, which rounds logits to its type; a plugin does
    not."""

    layer: int
    tensor: str
    router: Recipe | None
    rounds: bool


def watched_places(program: Program) -> list[str]:
    """The modules whose outputs are tensors of the graph, in its order: embedding, attention, MoE and layer."""
    names = (name for node in program.model.graph.node for name in node.output if name.endswith("/output"))
    return [place for name in names if _WATCHED.fullmatch(place := name.removesuffix("/output"))]


def router_taps(program: Program, plugins: Sequence[str]) -> list[RouterTap]:
    """By layer; ``plugins``: names of the nodes that run as such."""
    taps: dict[int, RouterTap] = {}
    for node in program.model.graph.node:
        layer = next((int(found[1]) for name in node.input if (found := _ROUTER.match(name))), None)
        if layer is None:
            continue
        if is_op_node(node):
            recipe = program.weights[node.input[1]]
            taps[layer] = RouterTap(layer, node.input[0], recipe, node.name not in plugins)
        elif node.op_type in ("Gemm", "MatMul"):
            taps[layer] = RouterTap(layer, node.output[0], None, True)
    return list(taps.values())


def with_outputs(program: Program, tensors: Sequence[str]) -> Program:
    """The program with more outputs. Raises: KeyError where the file does not say a tensor's type."""
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    known = {value.name: value for value in model.graph.value_info}
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(known[name] for name in dict.fromkeys(tensors) if name not in there)
    return Program(model, program.weights)


def tensors_of(places: Sequence[str], taps: Sequence[RouterTap]) -> list[str]:
    return [*map(output_of, places), *(tap.tensor for tap in taps)]


def layers_of(places: Sequence[str]) -> tuple[int | None, ...]:
    return tuple(layer_of(place) for place in places)


def read_routing(
    taps: Sequence[RouterTap], outputs: Mapping[str, np.ndarray], routers: Mapping[int, np.ndarray], dtype: str
) -> dict[int, np.ndarray]:
    """Router logits ``[tokens, experts]`` float32 by layer, as the program has them; ``routers [experts, hidden]`` float32, by
    layer."""
    from moecompiler.comparison.capture import rounded

    found = {}
    for tap in taps:
        values = np.asarray(outputs[tap.tensor], np.float32)
        if tap.router is not None:
            values = values.reshape(-1, values.shape[-1]) @ routers[tap.layer].T
            values = rounded(values, dtype).astype(np.float32) if tap.rounds else values
        found[tap.layer] = values
    return found
