"""What each single rewrite of a pass changes, seen while the pass runs.

Running the pass anew for each of its rewrites (``apply`` with a limit), and comparing whole graphs (``changed_region``), says the
same, and takes minutes where a pass makes hundreds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from moecompiler.debugging.report.fragment import Fragment
from moecompiler.debugging.report.surroundings import fragments
from moecompiler.debugging.watching import Watched
from moecompiler.graph import Program, module_of
from moecompiler.graph_text import types_by_name
from moecompiler.pipeline import Change, Pass


@dataclass(frozen=True)
class Recorded:
    """A rewrite, and the part of the graph that it changed, before and after it, with its neighbours."""

    change: Change
    before: Fragment
    after: Fragment


def record(step: Pass, before: Program, after: Program, first: int) -> Iterator[Recorded]:
    """Runs ``step``, which makes ``after`` of ``before``, on a copy; its rewrites are numbered from ``first`` on.

    What it does to the graph besides, after the last of them, comes at the end, as number 0.
    """
    graph, weights = gs.import_onnx(before.model), dict(before.weights)
    types = types_by_name(before.model) | types_by_name(after.model)
    watched = Watched(graph, weights)
    for number, rewrite in enumerate(step.rewrites(graph, weights), first):
        change = Change(rewrite.apply(), rewrite.node, rewrite.module, number)
        yield Recorded(change, *fragments(watched.advance(), watched, types))
    besides = watched.advance(whole=True)
    if not besides.empty:
        name = next(held.name for held in besides.nodes)
        change = Change("changed without a rewrite", name, module_of(name), 0)
        yield Recorded(change, *fragments(besides, watched, types))
