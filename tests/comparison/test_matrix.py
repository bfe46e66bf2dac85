"""Many artifacts in one table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made import made_result
from pages import Page, resolve

from moecompiler.comparison.matrix import artifact_names, matrix_of
from moecompiler.comparison.report.matrix import markdown, render, write_matrix
from moecompiler.comparison.result import OOTB, PLUGINS
from moecompiler.errors import UserError

RESULTS = {"float16": made_result(), "int4 & more": made_result(bad=True)}


def test_rows_are_the_programs() -> None:
    matrix = matrix_of(RESULTS)
    assert [(row.artifact, row.program) for row in matrix.rows] == [
        (name, program) for name in RESULTS for program in (PLUGINS, OOTB)
    ]
    result = RESULTS["float16"]
    assert result.model
    assert result.routing
    first, logits = matrix.rows[0], result.model.programs[0]
    assert (first.perplexity, first.mean_kl, first.top1) == (logits.perplexity, logits.mean_kl, logits.top1)
    assert first.increase == pytest.approx(logits.perplexity / result.model.reference_perplexity - 1)
    assert first.reference_perplexity == result.model.reference_perplexity
    assert (first.flips, first.rerouted) == (
        len(result.routing.programs[0].flips),
        result.routing.programs[0].rerouted,
    )
    assert (first.plugins, matrix.rows[1].plugins, first.decode_ms) == (16, 0, 2.31)
    assert [row.passed for row in matrix.rows] == [True, True, False, False]
    assert not matrix.passed
    assert matrix.notes == ()


def test_what_was_not_measured_has_no_column() -> None:
    result = replace(made_result(), routing=None)
    page = Page(render(matrix_of({"a": result, "b": result})))
    assert "rerouted" not in page.text
    assert "mean KL" in page.text
    nothing = replace(result, model=None, meta=replace(result.meta, programs=()))
    assert matrix_of({"a": nothing}).rows == ()
    assert "Perplexity and" not in render(matrix_of({"a": nothing}))


def test_another_text_is_said() -> None:
    other = made_result(tokens=48)
    (note, second) = matrix_of({"a": made_result(), "b": other}).notes
    assert note == "not all of one tokens: 24, 48"
    assert second.startswith("not all of one prompt tokens:")
    assert note in render(matrix_of({"a": made_result(), "b": other}))


def test_refusals(tmp_path: Path) -> None:
    result = made_result()
    other = replace(result, meta=replace(result.meta, model="8x7b"))
    with pytest.raises(UserError, match="one model, not of tiny-mixtral and 8x7b"):
        matrix_of({"a": result, "b": other})
    with pytest.raises(UserError, match="not of none"):
        matrix_of({})
    for name in ("..", "a/b", ""):
        with pytest.raises(UserError, match="cannot be the name of a report's folder"):
            write_matrix({name: result}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_names() -> None:
    paths = [Path("/x/int8"), Path("/y/int8"), Path("/x/fp8"), Path("/z/int8-2"), Path("/z/int8"), Path("/")]
    assert artifact_names(paths) == ["int8", "int8-2", "fp8", "int8-2-2", "int8-3", "artifact"]


def test_files_and_numbers(tmp_path: Path) -> None:
    path = write_matrix(RESULTS, tmp_path)
    assert path == tmp_path / "matrix.html"
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        *sorted([*RESULTS, "matrix.html", "matrix.json", "matrix.md"])
    ]
    page = Page(path.read_text())
    data = json.loads((tmp_path / "matrix.json").read_text())
    assert page.data == data
    assert data["passed"] is False
    for source in page.sources():
        assert isinstance(resolve(data, source), int | float)
    for key in ("mean_kl", "perplexity"):
        assert {f"/rows/{row}/{key}" for row in range(4)} <= set(page.sources("i"))
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a" and "report" in (attrs["href"] or "")]
    assert links == ["float16/report.html"] * 2 + ["int4%20%26%20more/report.html"] * 2
    said = (tmp_path / "matrix.md").read_text()
    assert said == markdown(matrix_of(RESULTS))
    assert "| [int4 & more](<int4 & more/report.html>) | float16 | none | tp1 pp1 | plugins off | 0 |" in said
    for name in RESULTS:
        assert (tmp_path / name / "report.html").is_file()
