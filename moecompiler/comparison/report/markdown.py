"""The comparison as Markdown: what the page says, without its plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moecompiler.comparison.report.layers import layer_table, steepest
from moecompiler.comparison.report.logits import continuations, histogram, replayed_rows
from moecompiler.comparison.report.ops import FIGURES, op_table, time_bars
from moecompiler.comparison.report.programs import Shown, shown
from moecompiler.comparison.report.routing import heats
from moecompiler.comparison.report.summary import bound, columns, headline, judged, properties
from moecompiler.comparison.result import LayerLevel, ModelLevel, OpLevel, Result, RoutingLevel
from moecompiler.pages.figures import counted, significant


def markdown(result: Result) -> str:
    """Names and texts in it may be anybody's: they are escaped."""
    programs = shown(result)
    return "\n\n".join(_parts(result, programs)) + "\n"


def table(titles: Sequence[object], rows: Sequence[Sequence[object]], *, raw: bool = False) -> str:
    """Titles and cells are escaped, which keeps them on one line; ``raw``: the cells are Markdown already."""
    written = str if raw else escaped
    lines = [
        [escaped(each) for each in titles],
        ["---"] * len(titles),
        *([written(each) for each in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: object) -> str:
    """Text as text: nothing in it is markup."""
    shown_text = str(text).replace("\n", "⏎")
    for sign in "\\`*_[]<>|#":
        shown_text = shown_text.replace(sign, f"\\{sign}")
    return shown_text


def _parts(result: Result, programs: Mapping[str, Shown]) -> Iterator[str]:
    meta = result.meta
    yield f"# Comparison of {escaped(meta.model)}: {headline(result)}"
    yield (
        f"{' and '.join(escaped(each.title) for each in programs.values())}, held against PyTorch in float32;"
        f" {escaped(meta.dtype)}, quantization {escaped(meta.quantization)}, mapping {escaped(meta.mapping)},"
        f" {escaped(meta.backend)}; {counted(meta.tokens, 'token')} of {escaped(meta.text)}, seed {meta.seed};"
        f" {escaped(meta.machine)}, {escaped(meta.date)}."
    )
    yield from (f"> {escaped(note)}" for note in result.notes)
    if result.verdict:
        yield "\n".join(f"- {'✗' if each.bad else '✓'} {escaped(each.level)}: {each.said()}" for each in judged(result))
        bad = [check for check in result.verdict if not check.passed]
        if bad:
            rows = [(each.level, each.name, each.subject, significant(each.value), bound(each)) for each in bad]
            yield table(("level", "check", "of", "value", "bound"), rows)
    if result.bisection:
        nodes = ", ".join(escaped(node) for node in result.bisection.culprits) or "none found"
        folder = f", cut out in {escaped(result.bisection.folder)}" if result.bisection.folder else ""
        yield f"Cause of “{escaped(result.bisection.check)}”: {nodes}{folder}."
    yield "## Programs"
    titles = ["", *(programs[name].title if name in programs else name for name in columns(result, programs))]
    yield table(titles, [(line.name, *line.cells) for line in properties(result, programs)])
    for title, parts in (
        ("Error by layer", _layer(result.layer, programs)),
        ("Model", _model(result, programs)),
        ("Routing", _routing(result.routing, programs)),
        ("Ops", _ops(result.op, programs)),
    ):
        yield f"## {title}"
        yield from parts


def _layer(level: LayerLevel | None, programs: Mapping[str, Shown]) -> Iterator[str]:
    if level is None:
        yield "Not measured."
        return
    yield escaped(level.how)
    yield "\n".join(f"- {escaped(said)}" for said in steepest(level, programs))
    found = layer_table(level, ("layer",), programs)
    yield table(("after", *found.titles), [(row.place, *(text for text, _ in row.values)) for row in found.rows])


def _model(result: Result, programs: Mapping[str, Shown]) -> Iterator[str]:
    level = result.model
    if level is None:
        yield "Not measured."
        return
    if level.programs:
        found = histogram(level, programs)
        titles = ("error of a logit", *(programs[each.program].title for each in level.programs))
        yield table(titles, [(group.label, *(bar.text for bar in group.bars)) for group in found.groups])
    for text in level.greedy:
        lines = [f"Greedy after “{escaped(text.prompt)}”:"]
        for each in continuations(text, programs):
            rest = f" **{escaped(each.other)}**{escaped(each.rest)}" if each.other else ""
            said = f" ({'a tie: ' if each.tie and each.other else ''}{escaped(each.said)})" if each.said else ""
            lines.append(f"- {escaped(each.title)}{said}:{escaped(each.same)}{rest}")
        yield "\n".join(lines)
    replayed = result.routing.replayed if result.routing else None
    if replayed and replayed.model:
        yield _apart(level, replayed.model, programs)


def _apart(level: ModelLevel, replayed: ModelLevel, programs: Mapping[str, Shown]) -> str:
    rows = replayed_rows(
        [("own experts", level, ("model",)), ("reference’s", replayed, ("routing", "replayed", "model"))]
    )
    titles = ("program", "routing", "mean KL", "top-1", "top-5", "max abs", "relative", "perplexity")
    return table(titles, [(programs[name].title, title, *(text for text, _ in cells)) for name, title, cells in rows])


def _routing(level: RoutingLevel | None, programs: Mapping[str, Shown]) -> Iterator[str]:
    if level is None:
        yield "Not measured."
        return
    for each in heats(level, programs):
        beyond = f"; {counted(each.beyond, 'flip')} beyond rounding" if each.beyond else ""
        yield f"{escaped(each.program.title)}: {each.summary}; {each.rerouted:.2%} of (layer, token) have any{beyond}."
        if each.total:
            rows = [(row.layer, *(cell.count or "" for cell in row.cells), row.total) for row in each.rows]
            yield table(("layer", *(f"e{expert}" for expert in range(level.experts)), "all"), rows)


def _ops(level: OpLevel | None, programs: Mapping[str, Shown]) -> Iterator[str]:
    if level is None:
        yield "Not measured."
        return
    found = op_table(level, programs)
    if level.times:
        lines = [
            (group.label, "; ".join(bar.tip.partition(", ")[2] for bar in group.bars))
            for group in time_bars(level, programs)
        ]
        yield table(("op", "time of a step"), lines)
    if not found.rows:
        yield "No node was compared."
        return
    yield f"{found.failed} of {counted(len(found.rows), 'case')} further from the truth; of each op and input the worst:"
    titles = [f"{each.title}: {what}" for each in found.programs for what in FIGURES]
    rows = [
        (
            *(row.case.op, row.case.case, row.case.node),
            *(text for texts in row.errors for text in texts),
            *(row.ratio, "" if row.case.no_further else "✗ further"),
        )
        for row in found.worst
    ]
    yield table(("op", "inputs", "node", *titles, "ratio [95%]", ""), rows)
