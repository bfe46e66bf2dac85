"""What changed between two graphs, node by node under HF modules, and what did not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from onnx import AttributeProto, NodeProto, TensorProto

from moecompiler.debugging.held import Held, Side, digest, held_by
from moecompiler.graph import module_of
from moecompiler.graph_text import node_text, op_of, types_by_name

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Edit:
    """A line that is there before, after, or (a changed one) both, in the graph's text."""

    before: str | None
    after: str | None

    @property
    def kind(self) -> str:
        return "added" if self.before is None else "removed" if self.after is None else "changed"


@dataclass(frozen=True)
class GraphDiff:
    """Two graphs' differences. ``modules``: HF module → its nodes' edits, in the order of the graph; ``ops``: how many nodes of
    each op there are before and after; ``notes``: what could not be compared."""

    modules: Mapping[str, tuple[Edit, ...]]
    ops: Mapping[str, tuple[int, int]]
    sections: Mapping[str, tuple[Edit, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.modules and not any(self.sections.values())

    @property
    def nodes(self) -> tuple[int, int]:
        return sum(before for before, _ in self.ops.values()), sum(after for _, after in self.ops.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "nodes": self.nodes,
            "ops": {name: list(counts) for name, counts in self.ops.items()},
            "modules": {module: _edits_json(edits) for module, edits in self.modules.items()},
            **{name: _edits_json(edits) for name, edits in self.sections.items()},
            "notes": list(self.notes),
        }


def diff(before: Side, after: Side) -> GraphDiff:
    """Compares two graphs. Nodes are the same node if they write the same tensor; the order in which they stand, and types that
    only one of the files notes, are no difference."""
    sides = (before, after)
    old, new = (_Nodes.of(side) for side in sides)
    typed = {*old.types} & {*new.types}
    modules: dict[str, list[Edit]] = {}
    for key in merged([*old.by_output], [*new.by_output]):
        a, b = old.by_output.get(key), new.by_output.get(key)
        if a is not None and b is not None and old.content(a, typed) == new.content(b, typed):
            continue
        here, there = a and old.text(a), b and new.text(b)
        both = a is not None and b is not None and (a.domain, a.op_type) == (b.domain, b.op_type)
        for node, edit in (((b or a), Edit(here, there)),) if both else ((a, Edit(here, None)), (b, Edit(None, there))):
            if node is not None:
                modules.setdefault(module_of(node.name), []).append(edit)
    weights, notes = _weights(old.held, new.held)
    sections = {
        "inputs": _edits(old.values("input"), new.values("input")),
        "outputs": _edits(old.values("output"), new.values("output")),
        "weights": weights,
        "functions": _edits(_functions(before), _functions(after)),
        "versions": _edits(_versions(before), _versions(after)),
    }
    counts = [Counter(op_of(node) for node in side.program.model.graph.node) for side in sides]
    ops = {op: (counts[0][op], counts[1][op]) for op in sorted({*counts[0]} | {*counts[1]})}
    return GraphDiff({name: tuple(edits) for name, edits in modules.items()}, ops, sections, notes)


def merged(old: Sequence[Key], new: Sequence[Key]) -> list[Key]:
    """All keys, in the old order, each that is new after the one it follows in the new order."""
    known, last = {*old}, None
    followers: dict[Key | None, list[Key]] = {}
    for key in new:
        if key in known:
            last = key
        else:
            followers.setdefault(last, []).append(key)
    return [*followers.get(None, ()), *(each for key in old for each in (key, *followers.get(key, ())))]


@dataclass(frozen=True)
class _Nodes:
    """A graph's nodes by the first tensor that each writes, and how to tell and show what each is."""

    side: Side
    by_output: dict[str, NodeProto]
    types: dict[str, str]
    held: dict[str, Held]

    @staticmethod
    def of(side: Side) -> _Nodes:
        graph = side.program.model.graph
        by_output = {next(filter(None, node.output), f"({index})"): node for index, node in enumerate(graph.node)}
        return _Nodes(side, by_output, types_by_name(side.program.model), held_by(side))

    @cached_property
    def small(self) -> dict[str, TensorProto]:
        return {name: each.tensor for name, each in self.held.items() if each.recipe is None}

    def text(self, node: NodeProto) -> str:
        return node_text(node, self.types, self.small)

    def content(self, node: NodeProto, typed: set[str]) -> tuple[str, list[bytes]]:
        """What a node is: its text, with the types that both graphs know, and the graphs among its attributes."""
        types = {name: self.types[name] for name in node.output if name in typed}
        graphs = [
            each.SerializeToString(deterministic=True)
            for each in sorted(node.attribute, key=lambda each: each.name)
            if each.type in (AttributeProto.GRAPH, AttributeProto.TENSOR)
        ]
        return node_text(node, types, self.small), graphs

    def values(self, kind: str) -> dict[str, str]:
        return {
            value.name: f"{value.name} {self.types[value.name]}"
            for value in getattr(self.side.program.model.graph, kind)
            if value.name not in self.held
        }


def _weights(old: Mapping[str, Held], new: Mapping[str, Held]) -> tuple[tuple[Edit, ...], tuple[str, ...]]:
    """Edits of what is too large to be written out where it is read: weights and tables. What stands in the nodes is theirs."""
    edits, unknown = [], 0
    before, after = ({name: each for name, each in held.items() if each.is_large} for held in (old, new))
    gone = {each.recipe: name for name, each in before.items() if name not in after and each.recipe is not None}
    for name in sorted({*before} | {*after}, key=_natural):
        a, b = before.get(name), after.get(name)
        if a is None or b is None:
            edits.append(Edit(f"{name} {a.type}" if a else None, f"{name} {b.type}{b.made_of(gone)}" if b else None))
            continue
        same = a.same_as(b)
        if same is None:
            unknown += 1
        elif not same:
            edits.append(Edit(f"{name} {a.described(b)}", f"{name} {b.described(a)}"))
    note = f"the data of {unknown} weights is not compared: one of the files has no data, or recipes where the other has data"
    return tuple(edits), (note,) if unknown else ()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9, and a weight's transposition after the weight."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _edits(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[Edit, ...]:
    return tuple(Edit(old.get(key), new.get(key)) for key in merged([*old], [*new]) if old.get(key) != new.get(key))


def _functions(side: Side) -> dict[str, str]:
    """The functions of a file; one whose body changed is changed, by its number of nodes and a digest."""
    return {
        f"{each.domain}::{each.name}": f"{each.domain}::{each.name}, {len(each.node)} nodes,"
        f" {digest(each.SerializeToString(deterministic=True))}"
        for each in side.program.model.functions
    }


def _versions(side: Side) -> dict[str, str]:
    model = side.program.model
    opsets = {
        each.domain or "ai.onnx": f"opset {each.domain or 'ai.onnx'} {each.version}" for each in model.opset_import
    }
    return {"ir": f"IR version {model.ir_version}"} | dict(sorted(opsets.items()))


def _edits_json(edits: Sequence[Edit]) -> dict[str, Any]:
    return {
        "removed": [each.before for each in edits if each.kind == "removed"],
        "added": [each.after for each in edits if each.kind == "added"],
        "changed": [{"before": each.before, "after": each.after} for each in edits if each.kind == "changed"],
    }
