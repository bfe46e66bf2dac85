"""Numbers after every pass: against the graph before it, and against Hugging Face's model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moecompiler.debugging.observe import boundaries
from moecompiler.debugging.subject import Subject
from moecompiler.debugging.unquantized import quantized_as
from moecompiler.graph import Program
from moecompiler.pipeline import Pass, PassResult, apply
from moecompiler.quantized import caches_of_codes, formats
from moecompiler.validation.difference import Difference, outputs_differ, relative_errors
from moecompiler.validation.tolerances import against_float, for_formats


@dataclass(frozen=True)
class Verified:
    """A pass (index from 1; 0 is what passes are given) and the numbers after it: ``before`` against the graph it was given,
    with the numbers that codes stand for where it quantizes weights, ``hf`` against Hugging Face's model, each None where there
    is no such. ``results``: rank by rank. ``enters``:
    the first module whose values differ, where the pass is out of tolerance and one is found."""

    index: int
    name: str
    results: tuple[PassResult, ...]
    before: Difference | None
    hf: Difference | None
    enters: str = ""

    @property
    def passed(self) -> bool:
        return all(each.passed for each in (self.before, self.hf) if each is not None)

    @property
    def matches(self) -> int:
        """Of all ranks together."""
        return sum(result.matches for result in self.results)

    def to_json(self) -> dict[str, Any]:
        differences = {"before": self.before, "hf": self.hf}
        return {
            "index": self.index,
            "name": self.name,
            "matches": self.matches,
            "passed": self.passed,
            **{key: each.to_json() if each is not None else None for key, each in differences.items()},
        }


def verify(
    subject: Subject, steps: Sequence[Pass], *, against_hf: bool = True
) -> Iterator[tuple[Verified, tuple[Program, ...]]]:
    """Runs ``steps`` one by one over all ranks' programs and compares the numbers after each; yields them with the programs.

    A pass that changed nothing on any rank leaves the numbers as they are. A pass that should have matched and did not is
    no matter here. The first that is out of tolerance is the last: what comes after it says nothing.
    """
    programs = subject.load()
    reference = subject.reference() if against_hf else None
    outputs = subject.run(programs)

    def against_hf_of(programs: Sequence[Program]) -> Difference | None:
        if reference is None:
            return None
        found = formats(programs)
        tolerances = [against_float(subject.tolerance, found, each[..., 0].size) for each in outputs]
        return outputs_differ(outputs, reference, tolerances)

    given = Verified(0, "given", (), None, against_hf_of(programs))
    yield given, programs
    if not given.passed:
        return
    for index, step in enumerate(steps, 1):
        applied = [apply(step, program) for program in programs]
        made, results = tuple(each for each, _ in applied), tuple(result for _, result in applied)
        before, found = outputs, formats(made)
        tolerances = [for_formats(subject.tolerance, found)] * len(outputs)
        if caches_of_codes(made) and not caches_of_codes(
            programs
        ):  # keys and values are rounded: no numbers stand for that
            tolerances = [
                against_float(each, found, y[..., 0].size) for each, y in zip(tolerances, outputs, strict=True)
            ]
        if formats(made) and not formats(programs):
            programs = quantized_as(programs, made)
            before = subject.run(programs)
        if any(_bytes(old) != _bytes(new) for old, new in zip(programs, made, strict=True)):
            outputs = subject.run(made)
        against_before = outputs_differ(outputs, before, tolerances)
        row = Verified(index, step.name, results, against_before, against_hf_of(made))
        if not row.passed:
            row = replace(row, enters=first_difference(subject, programs, made))
        programs = made
        yield row, programs
        if not row.passed:
            return


def _bytes(program: Program) -> tuple[bytes, dict[str, Any]]:
    return program.model.SerializeToString(deterministic=True), dict(program.weights)


def first_difference(subject: Subject, before: Sequence[Program], after: Sequence[Program]) -> str:
    """The first module whose output is beyond tolerance in ``after`` and was not in ``before``, with its rank where there are
    several; empty where none is: modules that one of the two has no output of are not seen."""
    tolerance = for_formats(subject.tolerance, formats(after))
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        names = [name for name in boundaries(old) if name in {*boundaries(new)}]
        reference, values = (subject.observe(programs, names, rank) for programs in (before, after))
        for name in names:
            errors = relative_errors(values[name], reference[name])
            if tolerance.worst(errors) > tolerance.norm:
                module = name.removesuffix("/output")
                return f"{module} on rank {rank}" if len(before) > 1 else module
    return ""
