"""The smallest set of plugins that makes a check fail: delta debugging over ops, then layers, then nodes.

A probe is a program in which exactly these nodes are plugins and all others are their bodies; how it is built and what is
checked is the caller's. Ops come first, then the layers of those that fail, then nodes (hierarchical delta debugging: G.
Misherghi, Z. Su, ICSE 2006), so a single wrong node among n is found with some log n programs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moecompiler.comparison.ddmin import Outcome, ddmin
from moecompiler.comparison.result import Probe
from moecompiler.errors import UserError
from moecompiler.graph import COLLECTIVES, DOMAIN, Program, module_of
from moecompiler.plugin_switches import Mode, PluginSwitches, Rule


@dataclass(frozen=True)
class PluginNode:
    """A node that can be a plugin. All ranks of a stage have it under the same name, and are switched together."""

    op: str
    name: str

    @property
    def layer(self) -> str:
        """``layers.3``; of a node outside of any layer its HF module."""
        module = module_of(self.name)
        found = re.search(r"\blayers\.\d+\b", module)
        return found[0] if found else module


@dataclass(frozen=True)
class Judgement:
    """What a check said of a program: ``value`` is the number that decided, None where there is none."""

    outcome: Outcome
    value: float | None = None
    note: str = ""


Judge = Callable[[PluginSwitches], Judgement]


@dataclass(frozen=True)
class Found:
    """``culprits``: nodes that fail together as plugins, and of which none can be left out (``minimal``; else the search ended
    at its limit). ``others``: what the check says of all the other plugins without them. ``probes``: every program that was
    tried, in order; those known before come first."""

    culprits: tuple[PluginNode, ...]
    minimal: bool
    others: Outcome
    probes: tuple[Probe, ...]


def plugin_nodes(programs: Iterable[Program], chosen: Iterable[str] | None = None) -> tuple[PluginNode, ...]:
    """The nodes of our ops in all ranks' programs, each name once, in the graphs' order; only those named in ``chosen``, where
    that is given. Bare collectives are none: they have no body."""
    names = None if chosen is None else set(chosen)
    nodes = (node for program in programs for node in program.model.graph.node)
    ours = (node for node in nodes if node.domain == DOMAIN and node.op_type not in COLLECTIVES)
    return tuple(
        dict.fromkeys(PluginNode(node.op_type, node.name) for node in ours if names is None or node.name in names)
    )


def switches_for(nodes: Iterable[PluginNode]) -> PluginSwitches:
    """Exactly these nodes are plugins."""
    return PluginSwitches((Rule("", "", Mode.OFF), *(Rule("", node.name, Mode.ON) for node in nodes)))


def find_culprits(
    nodes: Sequence[PluginNode],
    judge: Judge,
    known: Sequence[Probe] = (),
    told: Callable[[Probe], None] = lambda probe: None,
    about_to: Callable[[tuple[str, ...]], None] = lambda names: None,
    most: int = 200,
) -> Found:
    """Finds a smallest set of ``nodes`` for which ``judge`` says fail.

    ``known``: probes of an earlier run, which are not made again. ``about_to`` gets the names of the nodes of each new probe,
    ``told`` what came of it. ``most``: how many new probes there may be.

    Raises: UserError where all of them do not fail, or none of them does not pass: there is nothing to find, or it is not the
    plugins.
    """
    probes = _Probes(nodes, judge, known, told, about_to, most)
    if (whole := probes(nodes)) is not Outcome.FAIL:
        raise UserError(f"bisect: with all {len(nodes)} plugins the check says {whole}: there is nothing to find")
    if (bare := probes(())) is not Outcome.PASS:
        raise UserError(f"bisect: without any plugin the check says {bare}: it is not a plugin that breaks it")
    kept, minimal = tuple(nodes), True
    for key in (lambda node: node.op, lambda node: (node.op, node.layer), lambda node: node.name):
        groups: dict[object, list[PluginNode]] = {}
        for node in kept:
            groups.setdefault(key(node), []).append(node)
        try:
            kept = _flat(ddmin([tuple(group) for group in groups.values()], lambda chosen: probes(_flat(chosen))))
        except _EnoughError:
            kept, minimal = probes.smallest, False
            break
    rest = [node for node in nodes if node not in kept]
    return Found(kept, minimal, probes(rest, at_any_cost=True), tuple(probes.made))


def _flat(groups: Iterable[tuple[PluginNode, ...]]) -> tuple[PluginNode, ...]:
    return tuple(node for group in groups for node in group)


class _EnoughError(Exception):
    """The limit of probes is reached."""


class _Probes:
    """The probes made so far, each set of nodes once."""

    def __init__(
        self,
        nodes: Sequence[PluginNode],
        judge: Judge,
        known: Sequence[Probe],
        told: Callable[[Probe], None],
        about_to: Callable[[tuple[str, ...]], None],
        most: int,
    ):
        self._judge, self._told, self._about_to, self._left = judge, told, about_to, most
        self._order = {node: index for index, node in enumerate(nodes)}
        self.made = [*known]
        self._outcomes = {frozenset(probe.plugins): Outcome(probe.outcome) for probe in self.made}
        self.smallest: tuple[PluginNode, ...] = tuple(nodes)

    def __call__(self, nodes: Iterable[PluginNode], *, at_any_cost: bool = False) -> Outcome:
        chosen = tuple(sorted(nodes, key=self._order.__getitem__))
        names = tuple(node.name for node in chosen)
        if frozenset(names) not in self._outcomes:
            self._outcomes[frozenset(names)] = self._make(chosen, names, at_any_cost)
        outcome = self._outcomes[frozenset(names)]
        if outcome is Outcome.FAIL and len(chosen) < len(self.smallest):
            self.smallest = chosen
        return outcome

    def _make(self, chosen: tuple[PluginNode, ...], names: tuple[str, ...], at_any_cost: bool) -> Outcome:
        if self._left <= 0 and not at_any_cost:
            raise _EnoughError
        self._left -= 1
        self._about_to(names)
        begin = time.monotonic()
        try:
            found = self._judge(switches_for(chosen))
        except UserError as error:  # such as an engine that cannot be built so
            found = Judgement(Outcome.UNRESOLVED, note=str(error))
        probe = Probe(names, str(found.outcome), found.value, time.monotonic() - begin, found.note)
        self.made.append(probe)
        self._told(probe)
        return found.outcome
