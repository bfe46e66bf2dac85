"""What a reader wants to know first: the verdict, and the programs side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moecompiler.comparison.report.programs import Shown
from moecompiler.comparison.result import LEVELS, REFERENCE, Check, ProgramInfo, Result
from moecompiler.pages.figures import byte_size, counted, figure, fixed, share, significant

UNKNOWN = "–"


@dataclass(frozen=True)
class Judged:
    """A level's checks; ``bad`` are those that did not pass."""

    level: str
    checks: tuple[Check, ...]

    @property
    def bad(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    @property
    def good(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.passed)

    def said(self) -> str:
        """``41 of 42 checks passed``."""
        return f"{len(self.good)} of {counted(len(self.checks), 'check')} passed"


@dataclass(frozen=True)
class Property:
    """A line of the table of programs; ``cells``: of each program, and its source in the result."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """``lines``: of each program its style, title and figure."""

    title: str
    lines: tuple[tuple[str, str, str], ...]


def judged(result: Result) -> list[Judged]:
    """By level, in the order of ``LEVELS``; levels without a check are not there."""
    names = dict.fromkeys((*LEVELS, *(check.level for check in result.verdict)))
    found = [Judged(name, tuple(check for check in result.verdict if check.level == name)) for name in names]
    return [each for each in found if each.checks]


def headline(result: Result) -> str:
    if not result.verdict:
        return "nothing was held against a bound"
    if result.passed:
        return "✓ within bounds"
    return f"✗ out of bounds: {', '.join(each.level for each in judged(result) if each.bad)}"


def bound(check: Check) -> str:
    return f"{'≤' if check.at_most else '≥'} {significant(check.bound)}"


def columns(result: Result, programs: Mapping[str, Shown]) -> list[str]:
    """Programs of the table: those compared, then the reference where it is described or a level has figures of it."""
    known = {each.name for each in result.meta.programs}
    return [*programs, *([REFERENCE] if REFERENCE in known or result.model else [])]


def properties(result: Result, programs: Mapping[str, Shown]) -> list[Property]:
    """Accuracy, speed and memory of each program; lines of which nothing is known are left out."""
    names = columns(result, programs)
    infos = {each.name: each for each in result.meta.programs}
    lines = [
        *(Property(title, tuple(_told(infos.get(name), read) for name in names)) for title, read in _DESCRIBED),
        *_figures(result, names),
        *(Property(title, tuple(_told(infos.get(name), read) for name in names)) for title, read in _MEASURED),
    ]
    return [line for line in lines if any(cell != UNKNOWN for cell in line.cells)]


def tiles(result: Result, programs: Mapping[str, Shown]) -> list[Tile]:
    """The figures of the table that most want to see."""
    wanted = {
        "mean KL, nats": "KL from the reference, nats",
        "top-1 agreement": "top-1 as the reference",
        "perplexity": "perplexity",
        "tokens rerouted": "rerouted (layer, token)",
        "decode step": "decode step",
    }
    found = {line.name: line for line in properties(result, programs)}
    shown = [*programs.values()]
    return [
        Tile(
            title,
            tuple((each.style, each.title, cell) for each, cell in zip(shown, found[name].cells, strict=False)),
        )
        for name, title in wanted.items()
        if name in found
    ]


def _figures(result: Result, names: list[str]) -> list[Property]:
    model = {each.program: each for each in result.model.programs} if result.model else {}
    routing = {each.program: each for each in result.routing.programs} if result.routing else {}

    def of_model(read: Callable[..., str]) -> tuple[str, ...]:
        return tuple(read(model[name]) if name in model else UNKNOWN for name in names)

    perplexity = tuple(
        fixed(model[name].perplexity)
        if name in model
        else fixed(result.model.reference_perplexity)
        if name == REFERENCE and result.model
        else UNKNOWN
        for name in names
    )
    return [
        Property("perplexity", perplexity),
        Property("mean KL, nats", of_model(lambda each: figure(each.mean_kl))),
        Property("top-1 agreement", of_model(lambda each: share(each.top1))),
        Property("top-5 agreement", of_model(lambda each: share(each.top5))),
        Property("largest error of a logit", of_model(lambda each: figure(each.max_abs))),
        Property("relative error of logits", of_model(lambda each: figure(each.relative))),
        Property(
            "tokens rerouted",
            tuple(share(routing[name].rerouted) if name in routing else UNKNOWN for name in names),
        ),
    ]


def _told(info: ProgramInfo | None, read: Callable[[ProgramInfo], str | None]) -> str:
    return (read(info) if info else None) or UNKNOWN


def _plugins(info: ProgramInfo) -> str | None:
    return ", ".join(f"{count} {op}" for op, count in info.plugins.items()) or (
        "none" if info.name != REFERENCE else None
    )


_DESCRIBED: tuple[tuple[str, Callable[[ProgramInfo], str | None]], ...] = (
    ("directory", lambda each: each.directory),
    ("runs on", lambda each: f"{each.backend} ({each.runtime})" if each.runtime else each.backend),
    ("dtype", lambda each: each.dtype),
    ("quantization", lambda each: each.quantization),
    ("mapping", lambda each: each.mapping),
    ("plugin nodes", _plugins),
)
_MEASURED: tuple[tuple[str, Callable[[ProgramInfo], str | None]], ...] = (
    ("batch", lambda each: None if each.batch is None else str(each.batch)),
    ("prefill", lambda each: None if each.prefill_ms is None else f"{significant(each.prefill_ms)} ms"),
    ("decode step", lambda each: None if each.decode_ms is None else f"{significant(each.decode_ms)} ms"),
    ("tokens/s", lambda each: None if each.tokens_per_second is None else significant(each.tokens_per_second)),
    ("engines", lambda each: None if each.plan_bytes is None else byte_size(each.plan_bytes)),
    ("weights", lambda each: None if each.weight_bytes is None else byte_size(each.weight_bytes)),
    ("build", lambda each: None if each.build_seconds is None else f"{each.build_seconds:.1f} s"),
)
