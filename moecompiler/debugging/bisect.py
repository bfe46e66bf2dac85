"""The first pass, and then the first single rewrite, that breaks a check. Like LLVM's ``-opt-bisect-limit``.

Rewrites are numbered from 1 through a pipeline on each rank (``pipeline.Change.number``). A ``Prefix`` of them is all rewrites
of the first passes and some of the last one's, rank after rank. Every probe makes its prefix anew from the programs' files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moecompiler.debugging.subject import Subject
from moecompiler.errors import UserError
from moecompiler.graph import Program
from moecompiler.pipeline import Change, Pass, PassResult, apply, run_passes


@dataclass(frozen=True)
class Prefix:
    """The first ``passes`` passes, and of the last of them only ``rewrites`` (all, if None) over all ranks together."""

    passes: int
    rewrites: int | None = None


@dataclass(frozen=True)
class Probe:
    """What a prefix made of the programs, rank by rank, and what was done for it."""

    programs: tuple[Program, ...]
    results: tuple[tuple[PassResult, ...], ...]


@dataclass(frozen=True)
class Culprit:
    """The first rewrite that breaks the check: pass ``index`` (from 1), made on ``rank``. ``good`` and ``bad`` are the prefixes
    without and with it. ``change`` is None where the pass breaks it without a rewrite of its own. ``probes``: how many runs of
    the check it took."""

    index: int
    name: str
    rank: int
    change: Change | None
    good: Prefix
    bad: Prefix
    probes: int


def make(subject: Subject, steps: Sequence[Pass], prefix: Prefix) -> Probe:
    """Loads the programs from their files and makes a prefix of the rewrites."""
    programs, results = [], []
    left = prefix.rewrites
    for program in subject.load():
        program, done = run_passes(steps[: max(0, prefix.passes - 1)], program, allow_missed=True)
        if prefix.passes:
            made = sum(result.matches for result in done)
            limit = None if left is None else made + left
            program, last = apply(steps[prefix.passes - 1], program, first=made + 1, limit=limit)
            left = None if left is None else left - last.matches
            done.append(last)
        programs.append(program)
        results.append(tuple(done))
    return Probe(tuple(programs), tuple(results))


def bisect(subject: Subject, steps: Sequence[Pass], is_good: Callable[[Probe], bool]) -> Culprit:
    """Finds the culprit, with a check that holds for a prefix and not for a longer one.

    Raises: UserError where the check fails before any pass, or holds after all of them: there is nothing to find.
    """
    probes = 0

    def good(prefix: Prefix) -> bool:
        nonlocal probes
        probes += 1
        return is_good(make(subject, steps, prefix))

    if not good(Prefix(0)):
        raise UserError("bisect: the check fails before any pass: it is not a pass that breaks it")
    if good(Prefix(len(steps))):
        raise UserError("bisect: the check holds after all passes: there is nothing to find")
    index = first_bad(len(steps), lambda count: good(Prefix(count)))
    whole = make(subject, steps, Prefix(index))
    in_order = [(rank, change) for rank, done in enumerate(whole.results) for change in done[-1].changes]
    name = steps[index - 1].name
    if not in_order or not good(Prefix(index, 0)):
        return Culprit(index, name, 0, None, Prefix(index - 1), Prefix(index), probes)
    count = first_bad(len(in_order), lambda made: good(Prefix(index, made)))
    rank, change = in_order[count - 1]
    return Culprit(index, name, rank, change, Prefix(index, count - 1), Prefix(index, count), probes)


def culprit_of(subject: Subject, steps: Sequence[Pass], rank: int, number: int) -> Culprit:
    """The rewrite of that number on that rank, as if it had been found. Raises: UserError where there is no such rewrite."""
    results = make(subject, steps, Prefix(len(steps))).results
    if not 0 <= rank < len(results):
        raise UserError(f"--rank {rank}: there are ranks 0 to {len(results) - 1}")
    for index, step in enumerate(steps, 1):
        for change in results[rank][index - 1].changes:
            if change.number == number:
                earlier = sum(results[peer][index - 1].matches for peer in range(rank))
                count = earlier + 1 + results[rank][index - 1].changes.index(change)
                return Culprit(index, step.name, rank, change, Prefix(index, count - 1), Prefix(index, count), probes=0)
    total = sum(result.matches for result in results[rank])
    raise UserError(f"--rewrite {number}: rank {rank} has rewrites 1 to {total}")


def first_bad(count: int, is_good: Callable[[int], bool]) -> int:
    """The least n from 1 to ``count`` that is not good; 0 is good and ``count`` is not, and neither is tried."""
    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        if is_good(middle):
            good = middle
        else:
            bad = middle
    return bad
