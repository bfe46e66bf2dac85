"""What the report says, as plain data: passes, their numbers, their rewrites."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moecompiler.debugging.report.kinds import Kind, kinds_of
from moecompiler.debugging.report.recording import Recorded, record
from moecompiler.debugging.subject import Subject
from moecompiler.debugging.verify import Verified, verify
from moecompiler.graph import Program
from moecompiler.pipeline import Pass, apply
from moecompiler.validation.difference import Difference

Row = tuple[Verified, tuple[Program, ...]]


@dataclass(frozen=True)
class PassReport:
    """A pass over all ranks. ``nodes_before`` and ``nodes_after`` are the ranks' sums, and so are ``seconds``."""

    verified: Verified
    does: str
    nodes_before: int
    nodes_after: int
    seconds: float
    missed: tuple[str, ...]
    kinds: tuple[Kind, ...]

    @property
    def index(self) -> int:
        return self.verified.index

    @property
    def name(self) -> str:
        return self.verified.name

    @property
    def matches(self) -> int:
        return self.verified.matches

    def to_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "name": self.name,
            "does": self.does,
            "matches": self.matches,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "seconds": self.seconds,
            "missed": list(self.missed),
            "before": difference_json(self.verified.before),
            "hf": difference_json(self.verified.hf),
            "passed": self.verified.passed,
            "enters": self.verified.enters,
            "kinds": [kind.to_json() for kind in self.kinds],
        }


@dataclass(frozen=True)
class Report:
    """``given``: the numbers before any pass. ``checked``: whether numbers were taken at all. ``left``: the passes that did not
    run, for one before them was out of tolerance."""

    target: str
    pipeline: str
    ranks: int
    nodes: int
    checked: bool
    given: Verified
    passes: tuple[PassReport, ...]
    left: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.given.passed and all(each.verified.passed for each in self.passes)

    @property
    def matches(self) -> int:
        return sum(each.matches for each in self.passes)

    @property
    def kinds(self) -> int:
        return sum(len(each.kinds) for each in self.passes)

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.passes)

    @property
    def nodes_left(self) -> int:
        return self.passes[-1].nodes_after if self.passes else self.nodes

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "pipeline": self.pipeline,
            "ranks": self.ranks,
            "nodes_before": self.nodes,
            "nodes_after": self.nodes_left,
            "matches": self.matches,
            "kinds": self.kinds,
            "seconds": self.seconds,
            "checked": self.checked,
            "passed": self.passed,
            "given": {"passed": self.given.passed, "hf": difference_json(self.given.hf)},
            "passes": [each.to_json() for each in self.passes],
            "left": list(self.left),
        }


def make_report(
    subject: Subject,
    steps: Sequence[Pass],
    target: str,
    pipeline: str,
    *,
    checked: bool = True,
    against_hf: bool = True,
    told: Callable[[Verified], None] = lambda row: None,
) -> Report:
    """Runs ``steps``, and each again to record its rewrites; ``checked``: numbers are taken after each. ``told`` hears of each
    pass. Raises: UserError where the subject cannot be loaded or run."""
    rows = verify(subject, steps, against_hf=against_hf) if checked else _applied(subject, steps)
    given, programs = next(rows)
    told(given)
    nodes, first = sum(len(program.model.graph.node) for program in programs), [1] * len(programs)
    passes = []
    for row, made in rows:
        told(row)
        step = steps[row.index - 1]
        kinds = kinds_of(_recorded(step, programs, made, first))
        first = [start + result.matches for start, result in zip(first, row.results, strict=True)]
        passes.append(_pass_report(row, step, kinds))
        programs = made
    left = tuple(step.name for step in steps[len(passes) :])
    ranks = len(programs)
    return Report(target, pipeline, ranks, nodes, checked, given, tuple(passes), left)


def _applied(subject: Subject, steps: Sequence[Pass]) -> Iterator[Row]:
    """As ``verify``, without numbers."""
    programs = subject.load()
    yield Verified(0, "given", (), None, None), programs
    for index, step in enumerate(steps, 1):
        applied = [apply(step, program) for program in programs]
        programs = tuple(program for program, _ in applied)
        yield Verified(index, step.name, tuple(result for _, result in applied), None, None), programs


def _recorded(
    step: Pass, before: Sequence[Program], after: Sequence[Program], first: Sequence[int]
) -> Iterator[tuple[int, Recorded]]:
    """Each rank's rewrites. Ranks of one graph, whose weights alone differ, have the same."""
    known: dict[tuple[bytes, bytes, int], list[Recorded]] = {}
    for rank, (old, new, start) in enumerate(zip(before, after, first, strict=True)):
        key = (*(each.model.SerializeToString(deterministic=True) for each in (old, new)), start)
        if key not in known:
            known[key] = list(record(step, old, new, start))
        yield from ((rank, each) for each in known[key])


def _pass_report(row: Verified, step: Pass, kinds: tuple[Kind, ...]) -> PassReport:
    documented = inspect.getdoc(type(step)) or ""
    return PassReport(
        row,
        " ".join(documented.split("\n\n")[0].split()),
        sum(result.nodes_before for result in row.results),
        sum(result.nodes_after for result in row.results),
        sum(result.seconds for result in row.results),
        tuple(str(each) for result in row.results for each in result.missed),
        kinds,
    )


def difference_json(found: Difference | None) -> dict[str, Any] | None:
    """The figures; what is no finite number, which JSON has not, as a word."""
    if found is None:
        return None
    figures = found.to_json()
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in figures.items()
    }
