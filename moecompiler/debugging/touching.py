"""Which rewrites of a pass touch some nodes: remove them, change what they read, or make them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_graphsurgeon as gs

from moecompiler.graph import Program
from moecompiler.pipeline import Change, Pass, PassResult, Rewrite, apply
from moecompiler.weights import Recipe

_MOST_WATCHED = 1500  # nodes, each of which is looked at after every rewrite: three layers of a large model

IsMine = Callable[[str], bool]  # whether the node of that name is one of those looked at


@dataclass(frozen=True)
class Touch:
    """A rewrite that did something to nodes that are looked at. By name: those it ``removed``, those that read or write something
    else since (``changed``), and all nodes it ``made``, wherever they are, each with its op."""

    change: Change
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    made: tuple[tuple[str, str], ...]


def touches(
    step: Pass, program: Program, is_mine: IsMine, first: int = 1
) -> tuple[Program, PassResult, tuple[Touch, ...]]:
    """Runs a pass and tells its rewrites that touch nodes looked at; ``first`` is the number of its first rewrite.

    It runs twice where those nodes are not the same afterwards: which nodes stay is known after the first time, and a node
    is gone once nothing that stays depends on it. Of very many nodes only those are told at which a rewrite is.
    """
    after, result = apply(step, program, first=first)
    if sum(is_mine(node.name) for node in program.model.graph.node) > _MOST_WATCHED:
        left = {node.name for node in after.model.graph.node}
        changes = [change for change in result.changes if is_mine(change.node)]
        return (
            after,
            result,
            tuple(Touch(each, (each.node,) if each.node not in left else (), (), ()) for each in changes),
        )
    old, new = (_contents(each, is_mine) for each in (program, after))
    if old == new and not any(is_mine(change.node) for change in result.changes):
        return after, result, ()
    watched = _Watched(step, is_mine, {node.name for node in after.model.graph.node})
    _, again = apply(watched, program, first=first)
    found = [
        Touch(change, *effect)
        for change, effect in zip(again.changes, watched.effects, strict=True)
        if any(effect[:2]) or any(is_mine(name) for name, _ in effect[2]) or is_mine(change.node)
    ]
    return after, result, tuple(found)


def _contents(program: Program, is_mine: IsMine) -> list[bytes]:
    return [node.SerializeToString(deterministic=True) for node in program.model.graph.node if is_mine(node.name)]


_Effect = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, str], ...]]


class _Watched:
    """A pass that does what another does, and notes what each of its rewrites did to the nodes looked at."""

    def __init__(self, step: Pass, is_mine: IsMine, staying: Collection[str]):
        self._step, self._is_mine, self._staying = step, is_mine, staying
        self.name = step.name
        self.effects: list[_Effect] = []
        self._known: dict[int, gs.Node] = {}  # holds the nodes, so that no id is used twice
        self._mine: dict[int, tuple[gs.Node, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        self._new_nodes(graph)
        for rewrite in self._step.rewrites(graph, weights):
            yield Rewrite(rewrite.node, rewrite.module, partial(self._apply, rewrite, graph))

    def _apply(self, rewrite: Rewrite, graph: gs.Graph) -> str:
        count = len(graph.nodes)
        what = rewrite.apply()
        removed, changed = [], []
        outputs = {id(tensor) for tensor in graph.outputs}
        for node, was in list(self._mine.values()):
            now = _signature(node)
            if not self._is_alive(node, outputs):
                removed.append(node.name)
                del self._mine[id(node)]
            elif now != was:
                changed.append(node.name)
                self._mine[id(node)] = node, now
        # a look at all nodes takes longer than most rewrites: only where there may be new ones
        made = self._new_nodes(graph) if removed or changed or len(graph.nodes) != count else ()
        self.effects.append((tuple(removed), tuple(changed), made))
        return what

    def _new_nodes(self, graph: gs.Graph) -> tuple[tuple[str, str], ...]:
        """Nodes that were not there the last time, and begins to look at those of them that are to be looked at."""
        new = [node for node in graph.nodes if id(node) not in self._known]
        self._known |= {id(node): node for node in new}
        self._mine |= {id(node): (node, _signature(node)) for node in new if self._is_mine(node.name)}
        return tuple((node.name, node.op) for node in new)

    def _is_alive(self, node: gs.Node, outputs: Collection[int]) -> bool:
        """Whether something that stays, or one of the graph's ``outputs`` (ids), depends on it. What comes after a node that goes
        is soon one that stays, so this looks at few."""
        waiting, seen = [node], {id(node)}
        while waiting:
            current = waiting.pop()
            if current.outputs and current.name in self._staying:
                return True
            for tensor in current.outputs:
                if id(tensor) in outputs:
                    return True
                for reader in tensor.outputs:
                    if id(reader) not in seen:
                        seen.add(id(reader))
                        waiting.append(reader)
        return False


def _signature(node: gs.Node) -> Any:
    return [tensor.name for tensor in node.inputs], [tensor.name for tensor in node.outputs]
