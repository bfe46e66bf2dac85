"""Rewrites that are alike, one for each layer or rank, put together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moecompiler.debugging.report.fragment import Fragment, Mark
from moecompiler.debugging.report.recording import Recorded
from moecompiler.pipeline import Change

# a layer's or an expert's number in a module's path, and the number at the end of a node's name
_NUMBERS = re.compile(r"(?<=\.)\d+(?=[./]|$)|(?<=_)\d+(?=$|\W)")


@dataclass(frozen=True)
class Listed:
    """One rewrite in the list of its kind, and the ranks that made it at the same place under the same number."""

    number: int
    ranks: tuple[int, ...]
    what: str
    node: str
    module: str


@dataclass(frozen=True)
class Kind:
    """Rewrites that do the same, in modules of the same name but for numbers, to parts of the graph of the same shape. The
    pictures are of the first."""

    what: str
    module: str
    before: Fragment
    after: Fragment
    rewrites: tuple[Listed, ...]

    @property
    def count(self) -> int:
        return sum(len(each.ranks) for each in self.rewrites)

    @property
    def changed_ops(self) -> list[str]:
        """Ops of the nodes that read or write something else."""
        return _changed_ops(self.before)

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "module": self.module,
            "count": self.count,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "rewrites": [{**vars(each), "ranks": list(each.ranks)} for each in self.rewrites],
        }


def kinds_of(recorded: Iterable[tuple[int, Recorded]]) -> tuple[Kind, ...]:
    """The kinds of the rewrites, each with its rank, in order of their first."""
    found: dict[Any, tuple[Recorded, dict[Change, list[int]]]] = {}
    for rank, each in recorded:
        change = each.change
        key = without_numbers(change.what), without_numbers(change.module), _shape(each.before), _shape(each.after)
        _, members = found.setdefault(key, (each, {}))
        members.setdefault(change, []).append(rank)
    return tuple(
        Kind(what, module, first.before, first.after, tuple(_listed(*member) for member in members.items()))
        for (what, module, _, _), (first, members) in found.items()
    )


def _listed(change: Change, ranks: list[int]) -> Listed:
    return Listed(change.number, tuple(ranks), change.what, change.node, change.module)


def without_numbers(name: str) -> str:
    """``model.layers.3.mlp/Mul_7`` → ``model.layers.N.mlp/Mul_N``."""
    return _NUMBERS.sub("N", name)


def _shape(fragment: Fragment) -> Any:
    """What came or went, whatever its nodes and tensors are called and whatever its constants hold: nodes in the graph's order,
    tensors by which of them writes which output. Of nodes that merely read something else now: which ops there are."""
    nodes = [node for node in fragment.nodes if node.mark in (Mark.removed, Mark.added)]
    writers = {name: (place, slot) for place, node in enumerate(nodes) for slot, name in enumerate(node.outputs)}

    def tensor(name: str) -> tuple[object, str]:
        return writers.get(name), fragment.tensors[name].type

    return (
        tuple(
            (
                node.op,
                node.mark,
                len(node.constants),
                tuple((slot, tensor(name)) for slot, name in node.inputs),
                tuple(tensor(name) for name in node.outputs),
            )
            for node in nodes
        ),
        tuple(_changed_ops(fragment)),
    )


def _changed_ops(fragment: Fragment) -> list[str]:
    return sorted({node.op for node in fragment.nodes if node.mark == Mark.changed})
