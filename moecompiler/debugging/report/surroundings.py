"""What a rewrite changed, with the nodes next to it: one fragment of the graph before it, one of the graph after it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import onnx_graphsurgeon as gs

from moecompiler.debugging.report.fragment import Fragment, Mark, Node, Tensor, make_node, type_text
from moecompiler.debugging.watching import Changed, Held, Watched

MOST_READERS = 3  # of one tensor that are drawn for context
MOST_CHANGED = 6  # nodes that read something else, of one rewrite: a constant may have a reader in every layer


def fragments(changed: Changed, watched: Watched, types: Mapping[str, str]) -> tuple[Fragment, Fragment]:
    """Before and after; ``types`` by tensor name."""
    region = {id(held.node) for held in changed.nodes}
    ring = [node for node in _ring(changed, watched.is_alive) if id(node) not in region]
    context = [Held.of(node) for node in {id(node): node for node in ring}.values()]
    around = [(held, Mark.context) for held in context]
    shown = changed.changed[:MOST_CHANGED]
    olds, news = ([(pair[side], Mark.changed) for pair in shown] for side in (0, 1))
    before = [*((held, Mark.removed) for held in changed.removed), *olds, *around]
    after = [*((held, Mark.added) for held in changed.added), *news, *around]
    sides = (before, changed.place_before), (after, changed.place_after)
    first, second = (_fragment(marked, places, watched, types) for marked, places in sides)
    omitted = len(changed.changed) - len(shown)
    return replace(first, omitted=omitted), replace(second, omitted=omitted)


def _ring(changed: Changed, is_alive: Callable[[gs.Node], bool]) -> list[gs.Node]:
    """The nodes that write what came, went or is read anew, and the first of those that read it."""
    whole = [*changed.removed, *changed.added]
    if not whole:
        whole = [new for _, new in changed.changed]
    read = [tensor for held in whole for tensor in held.inputs]
    written = [tensor for held in whole for tensor in held.outputs]
    for old, new in changed.changed:
        read += _unlike(old.inputs, new.inputs)
        written += _unlike(old.outputs, new.outputs)
    nodes = [producer for tensor in read for producer in tensor.inputs if is_alive(producer)]
    for tensor in written:
        nodes += [reader for reader in tensor.outputs if is_alive(reader)][:MOST_READERS]
    return nodes


def _unlike(old: Sequence[gs.Tensor], new: Sequence[gs.Tensor]) -> list[gs.Tensor]:
    """The tensors that one has and the other has not."""
    ids = {id(tensor) for tensor in old} ^ {id(tensor) for tensor in new}
    return [tensor for tensor in (*old, *new) if id(tensor) in ids]


def _fragment(
    marked: Sequence[tuple[Held, Mark]], places: Mapping[int, int], watched: Watched, types: Mapping[str, str]
) -> Fragment:
    """The nodes that are in the graph at that moment, in its order. All that the changed ones read and all that is new is
    drawn, and what leads from one drawn node to another."""
    inside = sorted((each for each in marked if id(each[0].node) in places), key=lambda each: places[id(each[0].node)])
    written = {tensor.name for held, _ in inside for tensor in held.outputs}
    read = {tensor.name for held, _ in inside for tensor in _variables(held.inputs)}
    drawn: dict[str, gs.Tensor] = {}
    for held, mark in inside:
        own = mark in (Mark.removed, Mark.added)
        inputs = [t for t in _variables(held.inputs) if mark != Mark.context or t.name in written]
        outputs = [t for t in _variables(held.outputs) if own or t.name in read]
        drawn |= {tensor.name: tensor for tensor in (*inputs, *outputs)}
    nodes = [_within(make_node(held, mark, types), drawn) for held, mark in inside]
    shown = [node for node in nodes if node.mark != Mark.context or node.inputs or node.outputs]
    readers = {id(held.node) for held, _ in inside}
    tensors = {name: _described(tensor, watched, readers, types) for name, tensor in drawn.items()}
    return Fragment(tuple(shown), tensors)


def _variables(tensors: Sequence[gs.Tensor]) -> list[gs.Tensor]:
    return [tensor for tensor in tensors if isinstance(tensor, gs.Variable) and not tensor.is_empty()]


def _within(node: Node, drawn: Mapping[str, gs.Tensor]) -> Node:
    """Of a node for context only what ties it to the others."""
    inputs = tuple((slot, name) for slot, name in node.inputs if name in drawn)
    outputs = tuple(name for name in node.outputs if name in drawn)
    if node.mark == Mark.context:
        return replace(node, inputs=inputs, outputs=outputs, attributes="", constants=())
    return replace(node, inputs=inputs, outputs=outputs)


def _described(tensor: gs.Tensor, watched: Watched, readers: Collection[int], types: Mapping[str, str]) -> Tensor:
    graph = watched.graph
    role = "input" if _is_any_of(tensor, graph.inputs) else "output" if _is_any_of(tensor, graph.outputs) else ""
    unseen = {id(node) for node in tensor.outputs if watched.is_alive(node)} - {*readers}
    return Tensor(tensor.name, type_text(tensor, types), role, len(unseen))


def _is_any_of(tensor: gs.Tensor, tensors: Iterable[gs.Tensor]) -> bool:
    return any(tensor is each for each in tensors)
