"""What became of a node, or of the nodes of a module: which passes touched them, and why the others did not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from moecompiler.debugging.touching import IsMine, Touch, touches
from moecompiler.errors import UserError
from moecompiler.graph import Program, enclosing_modules, module_of
from moecompiler.graph_text import node_text, op_of, types_by_name
from moecompiler.pipeline import Missed, Pass
from moecompiler.weights import Recipe


@dataclass(frozen=True)
class Reason:
    """Why a pass left nodes alone; for several nodes, in the words that were said of the first."""

    text: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What pass ``index`` (from 1) did to the nodes that were there (``given``, by name), or why it did nothing. ``missed``: it
    should have matched in that module."""

    index: int
    name: str
    given: tuple[str, ...]
    touches: tuple[Touch, ...]
    reasons: tuple[Reason, ...]
    missed: tuple[Missed, ...]


@dataclass(frozen=True)
class Left:
    """A node that is there in the end; ``text`` as ``graph_text.node_text`` has it."""

    node: str
    op: str
    text: str


@dataclass(frozen=True)
class Explained:
    """``subject`` (a node or a module) through all passes. ``appears``: after which pass it is first there (0: as given).
    ``left``: nodes of it, and those made in place of such."""

    subject: str
    is_module: bool
    appears: int
    verdicts: tuple[Verdict, ...]
    left: tuple[Left, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "is_module": self.is_module,
            "appears": self.appears,
            "passes": [_verdict_json(each) for each in self.verdicts],
            "left": [{"node": each.node, "op": each.op, "text": each.text} for each in self.left],
        }


def explain(program: Program, steps: Sequence[Pass], subject: str) -> Explained:
    """Runs ``steps`` and looks at the node or module ``subject``, which may be one that a pass makes, and at what takes its
    place.

    Raises: UserError, with the names closest to it, where there is none of that name in any of the graphs.
    """
    followed: set[str] = set()

    def is_mine(name: str) -> bool:
        return is_of(subject, name) or name in followed

    given = [_named(program, is_mine)]
    names = {node.name for node in program.model.graph.node}
    verdicts: list[Verdict] = []
    made = 0
    for index, step in enumerate(steps, 1):
        after, result, touched = touches(step, program, is_mine, made + 1)
        reasons = (
            () if touched or not given[-1] else _reasons(step, program, given[-1], names_module=subject not in names)
        )
        missed = tuple(each for each in result.missed if _overlap(each.module, subject))
        verdicts.append(Verdict(index, step.name, given[-1], touched, reasons, missed))
        program, made = after, made + result.matches
        followed |= {name for touch in touched if touch.removed for name, _ in touch.made}
        names |= {node.name for node in program.model.graph.node}
        given.append(_named(program, is_mine))
    appears = next((index for index, each in enumerate(given) if each), None)
    if appears is None:
        raise UserError(
            f"{subject}: is no node or module of any graph, before, between or after the passes{_closest(subject, names)}"
        )
    return Explained(subject, subject not in names, appears, tuple(verdicts), _left(program, is_mine))


def is_of(subject: str, node: str) -> bool:
    """Whether the node of that name is the subject, or in it."""
    return node == subject or node.startswith((f"{subject}/", f"{subject}."))


def _named(program: Program, is_mine: IsMine) -> tuple[str, ...]:
    return tuple(node.name for node in program.model.graph.node if is_mine(node.name))


def _left(program: Program, is_mine: IsMine) -> tuple[Left, ...]:
    graph = program.model.graph
    types = types_by_name(program.model)
    small = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in program.weights}
    mine = (node for node in graph.node if is_mine(node.name))
    return tuple(Left(node.name, op_of(node), node_text(node, types, small)) for node in mine)


def _overlap(module: str, subject: str) -> bool:
    """Whether one is in the other."""
    return is_of(subject, module) or is_of(module, subject)


def _reasons(step: Pass, program: Program, names: Sequence[str], *, names_module: bool) -> tuple[Reason, ...]:
    """Why a pass leaves these nodes: of one with a pattern, how near it came; of another, what it says of each node."""
    graph = gs.import_onnx(program.model)
    weights = dict(program.weights)
    wanted = {*names}
    nodes = [node for node in graph.nodes if node.name in wanted]
    if hasattr(step, "nearest_miss"):
        if names_module:
            return (_nearest(step, graph, weights, nodes) or Reason("no node of it is the last of its pattern", ()),)
        around = _place(step, nodes[0])
        near = _nearest(step, graph, weights, [node for node in graph.nodes if is_of(around, node.name)])
        text = step.why_not(graph, weights, nodes[0])  # type: ignore[attr-defined]
        return (Reason(text, (nodes[0].name,)), *((near,) if near and around else ()))
    if not hasattr(step, "why_not"):
        return (Reason(f"{step.name} does not say why", tuple(names)),)
    said: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for node in nodes:
        text = (
            step.why_not(graph, weights, node) or "it would take it, had no rewrite before that one changed the graph"
        )
        kind = _without_names(text, node)
        texts.setdefault(kind, text)
        said.setdefault(kind, []).append(node.name)
    return tuple(Reason(texts[kind], tuple(each)) for kind, each in said.items())


def _nearest(step: Pass, graph: gs.Graph, weights: dict[str, Recipe], nodes: Sequence[gs.Node]) -> Reason | None:
    """How near the pattern came among these nodes; None where none of them is its last."""
    miss = step.nearest_miss(graph, weights, nodes)  # type: ignore[attr-defined]
    if miss.depth <= 0:
        return None
    where = (miss.node.name,) if miss.node is not None else ()
    matched = "1 node of its pattern" if miss.depth == 1 else f"{miss.depth} nodes of its pattern"
    return Reason(f"at its nearest {matched} matched, then: {miss.reason}", where)


def _place(step: Pass, node: gs.Node) -> str:
    """The module around a node in which the pass looks for its pattern; the node's own where it looks in none of them."""
    module = module_of(node.name)
    wanted = getattr(step, "modules", "")
    return next((each for each in enclosing_modules(module) if re.fullmatch(wanted, each)), module)


def _without_names(text: str, node: gs.Node) -> str:
    """What is said of a node, for what is said of others in the same words."""
    for name in {node.op, *(tensor.name for tensor in (*node.inputs, *node.outputs))} - {""}:
        text = text.replace(name, "*")
    return text


def _closest(subject: str, names: Iterable[str]) -> str:
    nodes = {*names}
    modules = {module_of(name) for name in nodes} - {""}
    near = difflib.get_close_matches(subject, sorted(nodes | modules), n=3, cutoff=0.5)
    return f"; closest are {', '.join(near)}" if near else ""


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "index": verdict.index,
        "name": verdict.name,
        "nodes": len(verdict.given),
        "rewrites": [
            {
                "number": each.change.number,
                "what": each.change.what,
                "node": each.change.node,
                "removed": list(each.removed),
                "changed": list(each.changed),
                "made": [name for name, _ in each.made],
            }
            for each in verdict.touches
        ],
        "why_not": [{"reason": each.text, "nodes": list(each.nodes)} for each in verdict.reasons],
        "missed": [str(each) for each in verdict.missed],
    }
