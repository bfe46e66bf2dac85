"""Where two graphs differ: the nodes that one has and the other has not, and the tensors where they meet again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import NodeProto

from moecompiler.graph import Program


@dataclass(frozen=True)
class Region:
    """What a rewrite changed, by names. ``removed`` nodes are in the graph before alone, or read or write something else after
    it, and ``added`` ones likewise the other way round. Both compute ``outputs`` (tensors that other nodes or the caller
    read) from ``inputs``, ``shared`` tensors of both graphs; weights and constants are not among them."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def changed_region(before: Program, after: Program) -> Region:
    """The smallest region that holds all differences of two programs of which a pass made one of the other."""
    old, new = before.model.graph, after.model.graph
    contents, new_contents = _contents(before), _contents(after)
    same = {*contents} & {*new_contents}
    removed = [node for node, content in zip(old.node, contents, strict=True) if content not in same]
    added = [node for node, content in zip(new.node, new_contents, strict=True) if content not in same]
    # the tensors that both graphs make by unlike nodes and somebody reads: there the two have to agree
    outputs = [name for name in _made(removed) if name in {*_made(added)} and _is_read(name, new, added)]
    inputs = _read_from_outside(removed, old) | _read_from_outside(added, new)
    return Region(
        tuple(node.name for node in removed),
        tuple(node.name for node in added),
        tuple(sorted(inputs)),
        tuple(outputs),
    )


def _contents(program: Program) -> list[bytes]:
    """Each node with all that it is; weights and constants that it reads count by what they are, not by their names."""
    held = {tensor.name: tensor.SerializeToString(deterministic=True) for tensor in program.model.graph.initializer}
    held |= {name: repr(recipe).encode() for name, recipe in program.weights.items()}
    return [
        node.SerializeToString(deterministic=True) + b"".join(held.get(name, b"") for name in node.input)
        for node in program.model.graph.node
    ]


def _made(nodes: Sequence[NodeProto]) -> list[str]:
    return [name for node in nodes for name in node.output if name]


def _is_read(name: str, graph: onnx.GraphProto, inside: Sequence[NodeProto]) -> bool:
    within = {id(node) for node in inside}
    by_graph = any(value.name == name for value in graph.output)
    return by_graph or any(name in node.input for node in graph.node if id(node) not in within)


def _read_from_outside(nodes: Sequence[NodeProto], graph: onnx.GraphProto) -> set[str]:
    held = {tensor.name for tensor in graph.initializer} | {""}
    return {name for node in nodes for name in node.input} - {*_made(nodes)} - held
