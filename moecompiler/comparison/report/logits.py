"""The model as a whole: how far logits are off, the divergence along the text, and what each program would write."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moecompiler.comparison.report.axes import LinearAxis, LogAxis, Tick, across, bounds, numbered
from moecompiler.comparison.report.plots import Bar, Bars, Curve, Mark, Plot, pointer
from moecompiler.comparison.report.programs import Shown
from moecompiler.comparison.result import GreedyText, ModelLevel, Result, Token
from moecompiler.pages.figures import counted, figure, fixed, share, significant

KL_STEPS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # nats: the same in every report, so that two can be held side by side


@dataclass(frozen=True)
class Piece:
    """A token of the text; ``step``: how many of ``KL_STEPS`` its divergence reaches."""

    text: str
    step: int
    source: str
    tip: str


@dataclass(frozen=True)
class Passage:
    """A row of the batch: ``before``, the text that was read first, and the tokens after which logits are compared; from
    ``decode`` on each was run by itself."""

    row: int
    before: str
    prefill: tuple[Piece, ...]
    decode: tuple[Piece, ...]


@dataclass(frozen=True)
class Strip:
    """The text as one program's divergence colours it."""

    program: Shown
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Continuation:
    """``same``: the text up to the first token that is not the reference's; ``other``: that token; ``rest``: what follows."""

    title: str
    style: str
    same: str
    other: str
    rest: str
    said: str
    tie: bool


@dataclass(frozen=True)
class Histogram:
    groups: tuple[Bars, ...]
    y_ticks: tuple[Tick, ...]
    x_ticks: tuple[Tick, ...]
    summary: str


def histogram(level: ModelLevel, programs: Mapping[str, Shown]) -> Histogram:
    """Shares of the logits by error, without bins at either end in which no program has any."""
    edges = level.programs[0].errors.edges
    filled = [
        index
        for index in range(len(edges) - 1)
        if any(each.errors.counts[index] for each in level.programs if index < len(each.errors.counts))
    ]
    bins = range(min(filled, default=0), max(filled, default=-1) + 1)
    totals = [sum(each.errors.counts) for each in level.programs]
    shares = [
        [each.errors.counts[index] / total if total else 0.0 for index in bins]
        for each, total in zip(level.programs, totals, strict=True)
    ]
    axis = LinearAxis.of(part for row in shares for part in row)
    groups = []
    for column, index in enumerate(bins):
        label = _bin(edges[index], edges[index + 1])
        bars = []
        for number, each in enumerate(level.programs):
            count, part = each.errors.counts[index], shares[number][column]
            program = programs[each.program]
            bars.append(
                Bar(
                    program.style,
                    axis.at(part),
                    share(part),
                    pointer("model", "programs", number, "errors", "counts", index),
                    f"error {label}, {program.title}: {counted(count, 'logit')}, {share(part)}",
                )
            )
        groups.append(Bars(label, tuple(bars)))
    marked = [_decade(edge) for edge in edges[bins.start : bins.stop + 1]] if bins else []
    said = ", ".join(f"{programs[each.program].title} at most {figure(each.max_abs)}" for each in level.programs)
    return Histogram(tuple(groups), axis.percents(), bounds(marked), f"Errors of logits in absolute value: {said}")


def kl_plots(level: ModelLevel, programs: Mapping[str, Shown]) -> list[Plot]:
    """One plot, or where there are too many tokens for two lines to be told apart, one for each program on the same axis."""
    axis = LogAxis.of(value for each in level.programs for value in each.kl)
    curves = [
        Curve(
            programs[each.program].style,
            tuple(
                Mark(
                    across(index, len(each.kl)),
                    axis.at(value),
                    pointer("model", "programs", number, "kl", index),
                    _kl_tip(level, programs, index),
                    begins=index > 0 and level.tokens[index].row != level.tokens[index - 1].row,
                )
                for index, value in enumerate(each.kl)
            ),
        )
        for number, each in enumerate(level.programs)
    ]
    said = [f"{programs[each.program].title} {figure(each.mean_kl)} in the mean" for each in level.programs]
    apart = any(curve.dense for curve in curves)
    groups = (
        [((curve,), words) for curve, words in zip(curves, said, strict=True)] if apart else [(curves, ", ".join(said))]
    )
    return [
        Plot(
            f"KL along the text: {programs[level.programs[number].program].title}" if apart else "KL along the text",
            f"KL divergence from the reference after {counted(len(level.tokens), 'token')}: {words}",
            "token",
            "nats",
            numbered([str(index) for index in range(len(level.tokens))]),
            axis.ticks(),
            tuple(group),
        )
        for number, (group, words) in enumerate(groups)
    ]


def context_of(result: Result) -> dict[int, str]:
    """Of each row, the text before the first token after which logits are compared, where it is known."""
    if result.routing is None or result.model is None:
        return {}
    first: dict[int, int] = {}
    for token in result.model.tokens:
        first.setdefault(token.row, token.position)
    context = dict.fromkeys(first, "")
    for token in result.routing.tokens:
        if token.position < first.get(token.row, 0):
            context[token.row] += token.text
    return context


def strips(level: ModelLevel, programs: Mapping[str, Shown], context: Mapping[int, str]) -> list[Strip]:
    """``context``: see ``context_of``."""
    found = []
    for number, each in enumerate(level.programs):
        rows: dict[int, dict[str, list[Piece]]] = {}
        for index, token in enumerate(level.tokens):
            piece = Piece(
                visible(token.text),
                sum(not each.kl[index] < step for step in KL_STEPS),
                pointer("model", "programs", number, "kl", index),
                _kl_tip(level, programs, index),
            )
            rows.setdefault(token.row, {}).setdefault(token.phase, []).append(piece)
        passages = (
            Passage(row, context.get(row, ""), *(tuple(phases.get(phase, ())) for phase in ("prefill", "decode")))
            for row, phases in rows.items()
        )
        found.append(Strip(programs[each.program], tuple(passages)))
    return found


def kl_legend() -> list[str]:
    """What each step of the strip's colours stands for, from the least."""
    steps = [figure(step) for step in KL_STEPS]
    between = [f"{low} to {high}" for low, high in pairwise(steps)]
    return [f"under {steps[0]}", *between, f"{steps[-1]} and more"]


def continuations(text: GreedyText, programs: Mapping[str, Shown]) -> Iterator[Continuation]:
    """The reference's, then each program's, parted where it first differs."""
    yield Continuation("reference", "p0", "".join(text.reference), "", "", "", False)
    for each in text.programs:
        program = programs[each.program]
        before, after = each.texts[: each.equal], each.texts[each.equal :]
        if each.margin is None:
            said = f"the same {counted(len(each.texts), 'token')}"
        else:
            wanted = text.reference[each.equal] if each.equal < len(text.reference) else ""
            got = after[0] if after else ""
            error = (
                "" if each.error is None else f"; the program’s largest error of a logit there is {figure(each.error)}"
            )
            said = (
                f"token {each.equal + 1} is “{_one_line(got)}”, the reference has “{_one_line(wanted)}” and prefers it by"
                f" {significant(each.margin)} logits{error}"
            )
        other = "".join(after[:1])
        spaces = other[: len(other) - len(other.lstrip(" "))]
        same, other, rest = "".join(before) + spaces, other.removeprefix(spaces), "".join(after[1:])
        yield Continuation(program.title, program.style, same, other or spaces, rest, said, each.tie)


def visible(text: str) -> str:
    """A token's text with its line ends to be seen; the line still ends."""
    return text.replace("\n", "⏎\n") or "∅"


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎")


def _kl_tip(level: ModelLevel, programs: Mapping[str, Shown], index: int) -> str:
    values = [f"{programs[each.program].title}: KL {figure(each.kl[index])}" for each in level.programs]
    return "\n".join((_where(level.tokens[index], index), *values))


def _where(token: Token, index: int) -> str:
    return f"{index}: after “{_one_line(token.text)}”, row {token.row}, position {token.position}, {token.phase}"


def _bin(low: float, high: float) -> str:
    if low == 0:
        return f"< {_power(high)}"
    return f"≥ {_power(low)}" if math.isinf(high) else f"{_power(low)}…{_power(high)}"


def _power(value: float) -> str:
    """``1e-3``, ``3.2e-3``."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _decade(edge: float) -> str:
    """What is written at an edge: nothing, where it is no power of ten."""
    if edge == 0 or math.isinf(edge):
        return "0" if edge == 0 else "∞"
    return _power(edge) if math.isclose(edge, 10.0 ** round(math.log10(edge))) else ""


def replayed_rows(
    levels: Sequence[tuple[str, ModelLevel, tuple[str, ...]]],
) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Of each (title, level, keys in the result) and program: name, title, and its figures with their sources."""
    rows = []
    for title, level, at in levels:
        for number, each in enumerate(level.programs):
            cells = [
                (figure(each.mean_kl), "mean_kl"),
                (share(each.top1), "top1"),
                (share(each.top5), "top5"),
                (figure(each.max_abs), "max_abs"),
                (figure(each.relative), "relative"),
                (fixed(each.perplexity), "perplexity"),
            ]
            rows.append((each.program, title, [(text, pointer(*at, "programs", number, key)) for text, key in cells]))
    return rows
