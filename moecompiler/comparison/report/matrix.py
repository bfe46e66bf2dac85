"""The matrix as an HTML page, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecompiler.atomic import json_text
from moecompiler.comparison.matrix import Matrix, MatrixRow, matrix_of
from moecompiler.comparison.report.axes import LinearAxis, LogAxis
from moecompiler.comparison.report.markdown import escaped, table
from moecompiler.comparison.report.plots import Curve, Mark, Plot, pointer
from moecompiler.comparison.report.programs import TITLES, Shown
from moecompiler.comparison.report.summary import UNKNOWN
from moecompiler.comparison.report.write import PAGE, write_files, write_report
from moecompiler.comparison.result import Result
from moecompiler.errors import UserError
from moecompiler.pages.figures import byte_size, counted, figure, fixed, share, significant
from moecompiler.pages.page import render_page

JSON, MARKDOWN, HTML = "matrix.json", "matrix.md", "matrix.html"


@dataclass(frozen=True)
class Cell:
    """``share``: of a bar behind the text, in percent of the column's largest; None: no bar."""

    text: str
    source: str
    share: float | None = None


@dataclass(frozen=True)
class Column:
    """``read``: the number, ``written``: how it is written; ``bar``: whether it is a size that a bar can show."""

    title: str
    key: str
    read: Callable[[MatrixRow], float | None]
    written: Callable[[float], str]
    bar: bool = True


COLUMNS = (
    Column("perplexity", "perplexity", lambda row: row.perplexity, fixed, bar=False),
    Column("reference’s", "reference_perplexity", lambda row: row.reference_perplexity, fixed, bar=False),
    Column("more", "increase", lambda row: row.increase, "{:+.2%}".format, bar=False),
    Column("mean KL", "mean_kl", lambda row: row.mean_kl, figure),
    Column("top-1", "top1", lambda row: row.top1, share, bar=False),
    Column("flips", "flips", lambda row: row.flips, "{:.0f}".format),
    Column("rerouted", "rerouted", lambda row: row.rerouted, share),
    Column("step, ms", "decode_ms", lambda row: row.decode_ms, significant),
    Column("tokens/s", "tokens_per_second", lambda row: row.tokens_per_second, significant),
    Column("engines", "plan_bytes", lambda row: row.plan_bytes, lambda value: byte_size(int(value))),
    Column("weights", "weight_bytes", lambda row: row.weight_bytes, lambda value: byte_size(int(value))),
)


def write_matrix(results: Mapping[str, Result], directory: Path) -> Path:
    """Writes each comparison's report into ``directory/NAME``, and ``matrix.json``, ``matrix.md`` and ``matrix.html``, which
    lead to them. The page's path.

    Raises: UserError where the results are of several models, a name is no folder's, or files cannot be written.
    """
    for name in results:
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"--matrix: {name!r} cannot be the name of a report's folder")
    matrix = matrix_of(results)
    for name, result in results.items():
        write_report(result, directory / name)
    texts = {JSON: json_text(matrix.to_json()), MARKDOWN: markdown(matrix), HTML: render(matrix)}
    return write_files(directory, texts)


def render(matrix: Matrix) -> str:
    programs = _programs(matrix)
    return render_page(
        __package__,
        {},
        template="matrix.html.j2",
        matrix=matrix,
        data=matrix.to_json(),
        page_of=lambda artifact: f"{artifact}/{PAGE}",
        programs=programs,
        columns=_columns(matrix),
        cells=_cells(matrix),
        plots=[plot for plot in _plots(matrix, programs) if plot],
    )


def markdown(matrix: Matrix) -> str:
    columns = _columns(matrix)
    rows = [
        (
            f"[{escaped(row.artifact)}](<{row.artifact}/{PAGE}>)",
            *(escaped(each) for each in (row.dtype, row.quantization, row.mapping, _title(row.program), row.plugins)),
            *(escaped(_text(column, row)) for column in columns),
            "✓" if row.passed else "✗",
        )
        for row in matrix.rows
    ]
    titles = (
        "artifact",
        "dtype",
        "quantization",
        "mapping",
        "program",
        "plugins",
        *(each.title for each in columns),
        "",
    )
    parts = [f"# Comparisons of {escaped(matrix.model)}", *(f"> {escaped(note)}" for note in matrix.notes)]
    return "\n\n".join([*parts, table(titles, rows, raw=True)]) + "\n"


def _columns(matrix: Matrix) -> list[Column]:
    """Those of which anything is known."""
    return [column for column in COLUMNS if any(column.read(row) is not None for row in matrix.rows)]


def _cells(matrix: Matrix) -> list[list[Cell]]:
    columns = _columns(matrix)
    known = ([value for row in matrix.rows if (value := column.read(row)) is not None] for column in columns)
    most = [max((value for value in values if math.isfinite(value)), default=0.0) for values in known]
    return [
        [
            Cell(_text(column, row), pointer("rows", index, column.key), _share(column, row, largest))
            for column, largest in zip(columns, most, strict=True)
        ]
        for index, row in enumerate(matrix.rows)
    ]


def _share(column: Column, row: MatrixRow, most: float) -> float | None:
    value = column.read(row)
    return LinearAxis(0.0, most, most).at(value) if column.bar and value is not None and most > 0 else None


def _text(column: Column, row: MatrixRow) -> str:
    value = column.read(row)
    return UNKNOWN if value is None else column.written(value)


def _plots(matrix: Matrix, programs: Mapping[str, Shown]) -> list[Plot | None]:
    """What accuracy costs: time and bytes across; upwards what formats lose, by perplexity, and what the arithmetic does, by its
    divergence from a reference of the same weights."""
    perplexity = _Axis("perplexity", "perplexity", lambda row: row.perplexity, fixed)
    divergence = _Axis("mean KL, nats", "mean_kl", lambda row: row.mean_kl, figure, log=True)
    time = _Axis("a decode step, ms", "decode_ms", lambda row: row.decode_ms, significant)
    size = _Axis("weights", "weight_bytes", lambda row: row.weight_bytes, lambda value: byte_size(int(value)))
    return [
        _plot(matrix, programs, "Perplexity and size", size, perplexity),
        _plot(matrix, programs, "Perplexity and time", time, perplexity),
        _plot(matrix, programs, "Divergence and time", time, divergence),
    ]


@dataclass(frozen=True)
class _Axis:
    """``key``: of the number in a row of ``matrix.json``."""

    title: str
    key: str
    read: Callable[[MatrixRow], float | None]
    written: Callable[[float], str]
    log: bool = False


def _plot(matrix: Matrix, programs: Mapping[str, Shown], title: str, x: _Axis, y: _Axis) -> Plot | None:
    """None where fewer than two programs have both figures."""
    known = [
        (index, row, across, upwards)
        for index, row in enumerate(matrix.rows)
        if (across := x.read(row)) is not None and (upwards := y.read(row)) is not None
    ]
    if len(known) < 2:
        return None
    horizontal = LinearAxis.of(across for _, _, across, _ in known)
    values = [upwards for *_, upwards in known]
    linear, log = LinearAxis.around(values), LogAxis.of(values)
    curves = []
    for program in programs.values():
        marks = tuple(
            Mark(
                horizontal.at(across),
                (log if y.log else linear).at(upwards),
                pointer("rows", index, y.key),
                f"{index + 1}: {row.artifact}, {program.title}\n{x.title}: {x.written(across)}\n{y.title}: {y.written(upwards)}",
                label=str(index + 1),
            )
            for index, row, across, upwards in known
            if row.program == program.name
        )
        curves.append(Curve(program.style, marks, line=False))
    summary = f"{counted(len(known), 'program')}, {y.title} from {y.written(min(values))} to {y.written(max(values))}"
    ticks = log.ticks() if y.log else linear.ticks(significant)
    return Plot(title, summary, x.title, y.title, horizontal.ticks(x.written), ticks, tuple(curves))


def _programs(matrix: Matrix) -> dict[str, Shown]:
    names: Sequence[str] = list(dict.fromkeys(row.program for row in matrix.rows))
    return {name: Shown(name, _title(name), f"p{place}") for place, name in enumerate(names, 1)}


def _title(program: str) -> str:
    return TITLES.get(program, program)
