"""Numbers after every pass, and the search for the rewrite that breaks them, on planted mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from planted import STEPS, BadConstant, LargeEpsilon, MakeSubject, SwappedGateAndUp, passes_with

from moecompiler.debugging.bisect import Prefix, Probe, bisect, culprit_of, first_bad, make
from moecompiler.debugging.subject import ExportedRanks
from moecompiler.debugging.verify import verify
from moecompiler.errors import UserError
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.validation.difference import outputs_differ

pytestmark = pytest.mark.xdist_group("debugging")
PLUGINS = named_pipelines()["plugins"]


def accuracy(subject: ExportedRanks) -> Callable[[Probe], bool]:
    reference = subject.run(subject.load())
    return lambda probe: outputs_differ(subject.run(probe.programs), reference, subject.tolerance).passed


@pytest.mark.parametrize(("mapping", "dtype"), [("one-rank", "float16"), ("ep2-pp2", "float32")])
def test_every_pass_keeps_the_numbers(subject_of: MakeSubject, mapping: str, dtype: str) -> None:
    rows = [row for row, _ in verify(subject_of(mapping, dtype, tidy=False), PLUGINS)]
    assert [row.name for row in rows] == ["given", *(step.name for step in PLUGINS)]
    assert all(row.passed for row in rows)
    assert rows[0].before is None
    assert all(row.hf is not None and row.hf.max_abs > 0 for row in rows)
    assert sum(row.matches for row in rows) > 100


def test_verify_stops_at_the_first_wrong_pass_and_names_the_layer(subject_of: MakeSubject) -> None:
    """On two ranks, a mistake in layer 2 of both."""
    rows = [row for row, _ in verify(subject_of("ep2"), passes_with(SwappedGateAndUp(3), STEPS), against_hf=False)]
    assert rows[-1].name == "fuse-moe"
    assert not rows[-1].passed
    assert rows[-1].enters == "model.layers.2.mlp on rank 0"
    assert rows[-1].to_json()["before"]["passed"] is False
    assert all(row.passed and row.hf is None for row in rows[:-1])


def test_bisect_names_the_third_match_of_a_pass(subject_of: MakeSubject) -> None:
    """Four layers have nine norms; the third is the first of layer 1."""
    subject = subject_of("one-rank")
    culprit = bisect(subject, passes_with(LargeEpsilon(3), STEPS), accuracy(subject))
    assert culprit.name == "fuse-rms-norm"
    assert culprit.change is not None
    assert (culprit.rank, culprit.change.module) == (0, "model.layers.1.input_layernorm")
    earlier = make(subject, STEPS, Prefix(culprit.index - 1)).results[0]
    assert culprit.change.number == sum(result.matches for result in earlier) + 3
    assert replace(culprit, probes=0) == culprit_of(subject, STEPS, 0, culprit.change.number)


def test_bisect_names_the_rank(subject_of: MakeSubject) -> None:
    """Of two pipeline stages with two layers each the first has four norms, the second five."""
    subject = subject_of("pp2")
    steps = passes_with(LargeEpsilon(5), STEPS)
    culprit = bisect(subject, steps, accuracy(subject))
    assert culprit.change is not None
    assert (culprit.rank, culprit.change.module) == (1, "model.norm")


def test_a_pass_that_breaks_things_without_a_rewrite(subject_of: MakeSubject) -> None:
    subject = subject_of("one-rank")
    culprit = bisect(subject, passes_with(BadConstant(0), STEPS), accuracy(subject))
    assert (culprit.name, culprit.change) == ("fuse-rms-norm", None)


def test_nothing_to_find(subject_of: MakeSubject) -> None:
    subject = subject_of("one-rank")
    with pytest.raises(UserError, match="holds after all passes"):
        bisect(subject, STEPS, lambda probe: True)
    with pytest.raises(UserError, match="fails before any pass"):
        bisect(subject, STEPS, lambda probe: False)
    with pytest.raises(UserError, match="--rewrite 99999: rank 0 has rewrites 1 to"):
        culprit_of(subject, STEPS, 0, 99999)


def test_each_probe_starts_from_files(subject_of: MakeSubject) -> None:
    """A check that spoils the programs it is given does not mislead later ones."""
    subject = subject_of("one-rank")
    good = accuracy(subject)

    def spoiling(probe: Probe) -> bool:
        found = good(probe)
        for program in probe.programs:
            del program.model.graph.node[:]
        return found

    culprit = bisect(subject, passes_with(LargeEpsilon(3), STEPS), spoiling)
    assert culprit.change is not None
    assert culprit.change.module == "model.layers.1.input_layernorm"


@pytest.mark.parametrize(
    ("count", "bad"), [(count, bad) for count in (1, 2, 7, 64) for bad in (1, count // 2 + 1, count)]
)
def test_first_bad(count: int, bad: int) -> None:
    tried = []

    def good(made: int) -> bool:
        tried.append(made)
        return made < bad

    assert first_bad(count, good) == bad
    assert len(tried) <= count.bit_length()
    assert not {0, count} & {*tried}
