"""Which rewrites of a pass touch some nodes: remove them, change what they read, or make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from moecompiler.debugging.watching import Changed, Held, Watched
from moecompiler.graph import Program
from moecompiler.pipeline import Change, Pass, PassResult, apply

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
    """Runs a pass and tells its rewrites that touch nodes looked at; ``first`` is the number of its first rewrite. It runs twice
    where those nodes are not the same afterwards."""
    after, result = apply(step, program, first=first)
    old, new = (_contents(each, is_mine) for each in (program, after))
    if old == new and not any(is_mine(change.node) for change in result.changes):
        return after, result, ()
    graph, weights = gs.import_onnx(program.model), dict(program.weights)
    watched = Watched(graph, weights)
    found = []
    for number, rewrite in enumerate(step.rewrites(graph, weights), first):
        change = Change(rewrite.apply(), rewrite.node, rewrite.module, number)
        touch = _touch(change, watched.advance(), is_mine)
        seen = [*touch.removed, *touch.changed, *(name for name, _ in touch.made), change.node]
        if any(map(is_mine, seen)):
            found.append(touch)
    return after, result, tuple(found)


def _contents(program: Program, is_mine: IsMine) -> list[bytes]:
    return [node.SerializeToString(deterministic=True) for node in program.model.graph.node if is_mine(node.name)]


def _touch(change: Change, done: Changed, is_mine: IsMine) -> Touch:
    def in_order(held: list[Held]) -> tuple[str, ...]:
        placed = sorted(held, key=lambda each: done.place_before.get(id(each.node), len(done.place_before)))
        return tuple(each.name for each in placed if is_mine(each.name))

    return Touch(
        change,
        in_order(list(done.removed)),
        in_order([old for old, _ in done.changed]),
        tuple((held.name, held.op) for held in done.added),
    )
