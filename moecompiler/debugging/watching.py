"""Which nodes differ between two moments of a graph that a pass is changing in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.debugging.touched import Touched
from moecompiler.weights import Recipe


@dataclass(frozen=True)
class Held:
    """What a node was when it was looked at; tensors and attribute values are the graph's own objects."""

    node: gs.Node
    name: str
    domain: str | None
    op: str
    inputs: tuple[gs.Tensor, ...]
    outputs: tuple[gs.Tensor, ...]
    attrs: dict[str, Any]

    @staticmethod
    def of(node: gs.Node) -> Held:
        return Held(node, node.name, node.domain, node.op, tuple(node.inputs), tuple(node.outputs), dict(node.attrs))


@dataclass(frozen=True)
class Changed:
    """What a rewrite did. ``changed``: nodes as they were and as they are. Nodes that nobody reads any more count as removed.
    ``place_before``, ``place_after``: where in the graph's list a node (by ``id``) stands."""

    removed: tuple[Held, ...]
    added: tuple[Held, ...]
    changed: tuple[tuple[Held, Held], ...]
    place_before: Mapping[int, int]
    place_after: Mapping[int, int]

    @property
    def nodes(self) -> tuple[Held, ...]:
        return (*self.removed, *self.added, *(new for _, new in self.changed))

    @property
    def empty(self) -> bool:
        return not self.nodes


class Watched:
    """A graph, and what it was when it was last looked at.

    Lists of inputs and outputs and attributes' values are compared as objects. Only nodes that were touched are looked at, and
    those next to them; where none differs all are, and where still none does, values that were changed in place.
    """

    def __init__(self, graph: gs.Graph, weights: dict[str, Recipe]):
        self.graph = graph
        self._weights = weights
        self._held = {id(node): Held.of(node) for node in graph.nodes}
        self._seen = {id(node): _mark(node) for node in graph.nodes}
        self._order = list(map(id, graph.nodes))
        self._places = dict(zip(self._order, range(len(self._order)), strict=True))
        self._touched = Touched(graph.nodes)
        self._recipes = dict(weights)
        self._values = {id(t): (t, t._values) for t in _constants(graph.nodes)}
        # what an If or a Loop reads from outside is no less needed than an output
        inner = [node for graph_ in graph.subgraphs(recursive=True) for node in graph_.nodes]
        needed = [*graph.outputs, *(tensor for node in inner for tensor in node.inputs)]
        self._needed = {id(tensor) for tensor in needed}
        self._dead = {id(node) for node in graph.nodes} - _reachable(needed)

    def is_alive(self, node: gs.Node) -> bool:
        """Whether it is in the graph and an output depends on it."""
        return id(node) in self._held and id(node) not in self._dead

    def advance(self, whole: bool = False) -> Changed:
        """What changed since the last look; ``whole``: every node is looked at, touched or not."""
        place_before = self._places
        fresh, gone = self._come_and_gone()
        places = self._places
        differing = self._unlike(self.graph.nodes if whole else self._touched.take())
        if not whole and not fresh and not differing:
            differing = self._unlike(self.graph.nodes)
        in_place = not fresh and not differing
        if in_place:
            differing = self._readers_of_new_values()
        self._recipes = dict(self._weights)
        before = [(self._held[id(node)], node) for node in differing]
        for held in gone:
            del self._held[id(held.node)]
        removed = [held for held in gone if id(held.node) not in self._dead]
        self._dead -= {id(held.node) for held in gone}
        self._look_at([*fresh, *differing])
        revived = self._revive([*fresh, *differing])
        orphans = [producer for held in (*removed, *(old for old, _ in before)) for producer in _producers(held)]
        died = self._bury([*fresh, *differing, *orphans])
        left = {id(old.node): old for old, _ in before}
        new = {id(node) for node in fresh}
        removed += [left.get(id(node), self._held[id(node)]) for node in died if id(node) not in new]
        pairs = [(old, self._held[id(node)]) for old, node in before if self.is_alive(node)]
        return Changed(
            tuple(removed),
            tuple(self._held[id(node)] for node in (*fresh, *revived) if self.is_alive(node)),
            tuple((old, new) for old, new in pairs if in_place or _content(old) != _content(new)),
            place_before,
            places,
        )

    def _come_and_gone(self) -> tuple[list[gs.Node], list[Held]]:
        """Nodes that were put into the graph's list, and those that were taken out."""
        order = list(map(id, self.graph.nodes))
        if order == self._order:
            return [], []
        self._order = order
        self._places = dict(zip(order, range(len(order)), strict=True))
        fresh = [node for node in self.graph.nodes if id(node) not in self._held]
        return fresh, [held for key, held in self._held.items() if key not in self._places]

    def _unlike(self, nodes: Iterable[gs.Node]) -> list[gs.Node]:
        """Those that are not what they were, in the graph's order."""
        found = [node for node in nodes if self.is_alive(node) and _mark(node) != self._seen.get(id(node))]
        return sorted((node for node in found if id(node) in self._places), key=lambda node: self._places[id(node)])

    def _look_at(self, nodes: Sequence[gs.Node]) -> None:
        self._held |= {id(node): Held.of(node) for node in nodes}
        self._seen |= {id(node): _mark(node) for node in nodes}
        self._touched.watch(nodes)

    def _readers_of_new_values(self) -> list[gs.Node]:
        """Nodes that read a constant, or a weight, whose values are others now."""
        new = {name for name, recipe in self._weights.items() if self._recipes.get(name, recipe) != recipe}
        touched = {key for key, (tensor, values) in self._values.items() if not _same_values(values, tensor._values)}
        self._values = {id(t): (t, t._values) for t in _constants(self.graph.nodes)}
        alive = [node for node in self.graph.nodes if self.is_alive(node)]
        return [node for node in alive if any(t.name in new or id(t) in touched for t in node.inputs)]

    def _revive(self, readers: Iterable[gs.Node]) -> list[gs.Node]:
        """Takes back the nodes that were dead and that these, or what they read, depend on."""
        revived = []
        waiting = [producer for node in readers for producer in _producers(self._held[id(node)])]
        while waiting:
            node = waiting.pop()
            if id(node) in self._dead:
                self._dead.discard(id(node))
                self._look_at([node])
                revived.append(node)
                waiting += _producers(self._held[id(node)])
        return revived

    def _bury(self, candidates: Iterable[gs.Node]) -> list[gs.Node]:
        """Marks those of the candidates, and of what they read, that nobody reads; gives them back."""
        died, waiting = [], list(candidates)
        while waiting:
            node = waiting.pop()
            if self.is_alive(node) and not any(self._is_read(tensor) for tensor in node.outputs):
                self._dead.add(id(node))
                died.append(node)
                waiting += _producers(Held.of(node))
        return died

    def _is_read(self, tensor: gs.Tensor) -> bool:
        return id(tensor) in self._needed or any(self.is_alive(reader) for reader in tensor.outputs)


def _constants(nodes: Iterable[gs.Node]) -> Iterable[gs.Constant]:
    return (tensor for node in nodes for tensor in node.inputs if isinstance(tensor, gs.Constant))


def _producers(held: Held) -> list[gs.Node]:
    return [producer for tensor in held.inputs for producer in tensor.inputs]


def _reachable(outputs: Iterable[gs.Tensor]) -> set[int]:
    """The nodes (by ``id``) that the outputs depend on."""
    found: set[int] = set()
    waiting = [producer for tensor in outputs for producer in tensor.inputs]
    while waiting:
        node = waiting.pop()
        if id(node) not in found:
            found.add(id(node))
            waiting += [producer for tensor in node.inputs for producer in tensor.inputs]
    return found


def _mark(node: gs.Node) -> tuple[Any, ...]:
    """What tells whether a node is as it was, while the objects in it live. onnx-graphsurgeon's own equality goes by name: a
    constant that stands where a variable of its name stood is another."""
    inputs, outputs, attributes = map(id, node.inputs), map(id, node.outputs), map(id, node.attrs.values())
    return node.op, node.name, *inputs, None, *outputs, None, *attributes


def _same_values(old: Any, new: Any) -> bool:
    """Reading a constant that was not loaded yet loads it, which is no change."""
    if old is new or not isinstance(old, LazyValues) or isinstance(new, LazyValues):
        return old is new
    return np.array_equal(old.load(), new)


def _content(held: Held) -> tuple[Any, ...]:
    """What is in a node, apart from which objects say so."""

    def tensor(each: gs.Tensor) -> tuple[Any, ...]:
        return each.name, id(each._values) if isinstance(each, gs.Constant) else None

    attributes = [(name, id(value)) for name, value in sorted(held.attrs.items())]
    return held.name, held.op, [*map(tensor, held.inputs)], [*map(tensor, held.outputs)], attributes
