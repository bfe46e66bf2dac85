"""Patterns over graphs: what a subgraph looks like, from its last node back to its inputs.

A pattern is a tree. ``Op`` is a node with patterns for its inputs; ``Var`` binds a tensor by name (twice the same name: the
same tensor); ``Const`` binds a small constant that passes a test; ``OneOf`` offers spellings; ``Through`` looks past nodes
that do not matter (casts). ``match`` finds the bindings, or says how far it came and what was in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

_FLOATING = tuple(onnx.TensorProto.DataType.Value(name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"))
_LARGEST_CONSTANT = 1 << 20  # elements; anything larger is a weight, which is never read

# How many nodes a side path (the shape of an inner tensor) may have before it is back in the match: torch's tracing exporter
# spends nine on the shape of an ``expand``.
_SIDE_STEPS = 10


@dataclass(frozen=True)
class Var:
    """Any tensor."""

    name: str


@dataclass(frozen=True)
class Const:
    """A constant that is no weight and for which ``test`` holds; ``what`` says in words what it must be."""

    name: str
    what: str = "a constant"
    test: Callable[[np.ndarray], bool] = lambda value: True


@dataclass(frozen=True)
class Op:
    """A node of a standard op with these inputs (further ones are left alone); ``name`` binds the node (twice the same name:
    the same node); ``commutative``: its first two inputs in either order; ``output``: which of its outputs is read; ``test``
    says of a node why it is not the right one, or None."""

    op: str
    inputs: tuple[Pattern, ...]
    name: str = ""
    commutative: bool = False
    output: int = 0
    test: Callable[[gs.Node], str | None] = lambda node: None


@dataclass(frozen=True)
class OneOf:
    """The first of several spellings that matches."""

    options: tuple[Pattern, ...]


@dataclass(frozen=True)
class Through:
    """``inner``, with nodes of the given ops after it: as many as there are, rather than few. A ``Cast`` has to be to another
    floating-point type of 16 bits or more, unless ``any_type``: what it rounds is then within what the ops round."""

    ops: tuple[str, ...]
    inner: Pattern
    any_type: bool = False


Pattern = Var | Const | Op | OneOf | Through

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")  # the same elements in the same order, by another shape


@dataclass(frozen=True)
class Match:
    """Tensors and nodes by their names in the pattern, and all nodes that it covers, the last of the graph first."""

    tensors: Mapping[str, gs.Tensor] = field(default_factory=dict)
    named: Mapping[str, gs.Node] = field(default_factory=dict)
    nodes: tuple[gs.Node, ...] = ()

    def scalar(self, name: str) -> float:
        """The value of a one-element constant."""
        value = small_constant(self.tensors[name])
        if value is None:
            raise ValueError(f"{name} stands for {self.tensors[name].name}, which is no small constant")
        return float(value.reshape(()))


@dataclass
class Miss:
    """The deepest that any attempt came: how many nodes had matched, which tensor or node was not right, and why."""

    depth: int = -1
    node: gs.Node | None = None
    reason: str = "the graph has no node like the pattern's last"

    @property
    def where(self) -> str:
        """The node and the reason, to go on behind what was looked for."""
        return f"{f', at {self.node.name}' if self.node is not None else ''}: {self.reason}"

    def note(self, so_far: Match, node: gs.Node | None, reason: str) -> None:
        if len(so_far.nodes) > self.depth:
            self.depth, self.reason = len(so_far.nodes), reason
            self.node = node if node is not None else (so_far.nodes[-1] if so_far.nodes else None)


def match(pattern: Op, node: gs.Node, miss: Miss) -> Match | None:
    """The first match that ends in ``node``; where there is none, ``miss`` hears how far it came."""
    return next(_match_node(pattern, node, Match(), miss), None)


def match_tensor(pattern: Pattern, tensor: gs.Tensor, miss: Miss) -> Match | None:
    """The first match of what computes ``tensor``."""
    return next(_match_tensor(pattern, tensor, Match(), miss), None)


def match_all(pairs: Sequence[tuple[Pattern, gs.Tensor]], miss: Miss, so_far: Match | None = None) -> Match | None:
    """The first match of what computes several tensors, in which a name stands for the same everywhere and for what it does in
    ``so_far``, if it is there."""
    patterns, tensors = zip(*pairs, strict=True)
    return next(_match_inputs(patterns, list(tensors), so_far or Match(), miss), None)


def _match_node(pattern: Op, node: gs.Node, so_far: Match, miss: Miss) -> Iterator[Match]:
    if node.op != pattern.op or node.domain not in ("", None):
        miss.note(so_far, node, f"{node.op} where {pattern.op} was expected")
        return
    if len(node.inputs) < len(pattern.inputs):
        miss.note(so_far, node, f"{node.op} has {len(node.inputs)} inputs, {len(pattern.inputs)} were expected")
        return
    if reason := pattern.test(node):
        miss.note(so_far, node, f"{node.op}: {reason}")
        return
    if so_far.named.get(pattern.name, node) is not node:
        miss.note(so_far, node, f"{node.name} is not {so_far.named[pattern.name].name}, which it must be")
        return
    named = dict(so_far.named) | ({pattern.name: node} if pattern.name else {})
    entered = Match(so_far.tensors, named, (*so_far.nodes, node))
    orders = [list(node.inputs)]
    if pattern.commutative:
        orders.append([node.inputs[1], node.inputs[0], *node.inputs[2:]])
    for tensors in orders:
        yield from _match_inputs(pattern.inputs, tensors, entered, miss)


def _match_inputs(
    patterns: tuple[Pattern, ...], tensors: list[gs.Tensor], so_far: Match, miss: Miss
) -> Iterator[Match]:
    if not patterns:
        yield so_far
        return
    for found in _match_tensor(patterns[0], tensors[0], so_far, miss):
        yield from _match_inputs(patterns[1:], tensors[1:], found, miss)


def _match_tensor(pattern: Pattern, tensor: gs.Tensor, so_far: Match, miss: Miss) -> Iterator[Match]:
    match pattern:
        case Var(name):
            yield from _bind(name, tensor, so_far, miss)
        case Const(name, what, test):
            value = small_constant(tensor)
            if value is None or not test(value):
                miss.note(so_far, None, f"input {tensor.name} is not {what}")
            else:
                yield from _bind(name, tensor, so_far, miss)
        case OneOf(options):
            for option in options:
                yield from _match_tensor(option, tensor, so_far, miss)
        case Through(ops, inner, any_type):
            producer = producer_of(tensor)
            if producer is not None and producer.op in ops:
                if any_type or _keeps_numbers(producer):
                    passed = Match(so_far.tensors, so_far.named, (*so_far.nodes, producer))
                    yield from _match_tensor(pattern, producer.inputs[0], passed, miss)
                else:
                    name = onnx.TensorProto.DataType.Name(producer.attrs["to"])
                    miss.note(so_far, producer, f"it casts to {name}, not to a floating-point type")
            yield from _match_tensor(inner, tensor, so_far, miss)
        case Op():
            producer = producer_of(tensor)
            if producer is None:
                kind = "a constant" if isinstance(tensor, gs.Constant) else "a graph input"
                miss.note(so_far, None, f"input {tensor.name} is {kind} where {pattern.op} was expected")
            elif producer.outputs[pattern.output :][:1] != [tensor]:
                miss.note(so_far, producer, f"output {tensor.name} is not output {pattern.output} of {producer.op}")
            else:
                yield from _match_node(pattern, producer, so_far, miss)


def _keeps_numbers(node: gs.Node) -> bool:
    return node.op != "Cast" or node.attrs["to"] in _FLOATING


def _bind(name: str, tensor: gs.Tensor, so_far: Match, miss: Miss) -> Iterator[Match]:
    bound = so_far.tensors.get(name)
    if bound is not None and bound is not tensor:
        miss.note(so_far, None, f"input {tensor.name} differs from {bound.name}, which stands for {name} elsewhere")
        return
    yield Match({**so_far.tensors, name: tensor}, so_far.named, so_far.nodes)


def producer_of(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None


def small_constant(tensor: gs.Tensor) -> np.ndarray | None:
    """The values of a constant, or of what a ``Constant`` node gives, if it is no weight: those are stored outside the graph."""
    producer = producer_of(tensor)
    if producer is not None and producer.op == "Constant" and "value" in producer.attrs:
        tensor = producer.attrs["value"]
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape or (), dtype=np.int64)) > _LARGEST_CONSTANT:
        return None
    held = tensor._values
    if isinstance(held, LazyValues) and held.tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    return np.asarray(tensor.values)


def escaping(found: Match, graph: gs.Graph, kept: tuple[gs.Tensor, ...]) -> str | None:
    """Why a match cannot be replaced: something inside it, other than ``kept``, is read from outside. A node that reads it but
    feeds nothing but the match (the shape of one of its tensors, say) counts as inside."""
    inside = {id(node) for node in found.nodes}
    outputs = {id(tensor) for tensor in graph.outputs}

    def stays(node: gs.Node, steps: int = _SIDE_STEPS) -> bool:
        if id(node) in inside:
            return True
        if not steps or not all(id(each) not in outputs and each.outputs for each in node.outputs):
            return False
        if all(stays(reader, steps - 1) for each in node.outputs for reader in each.outputs):
            inside.add(id(node))
            return True
        return False

    for node in found.nodes:
        for tensor in node.outputs:
            if any(tensor is each for each in kept):
                continue
            if id(tensor) in outputs:
                return f"{tensor.name}, inside it, is an output of the graph"
            for reader in tensor.outputs:
                if not stays(reader):
                    return f"{tensor.name}, inside it, is also read by {reader.name}"
    return None
