"""What was measured against what may be: one check for each bound (``thresholds``)."""

from __future__ import annotations

from collections.abc import Iterator

from moecompiler.comparison.result import Check, LayerLevel, ModelLevel, OpCase, OpLevel, RoutingLevel
from moecompiler.comparison.thresholds import Bounds, held

REPLAYED = "replayed, "
"""Begins the names of checks of programs with routing replayed."""


def verdict(
    bounds: Bounds,
    op: OpLevel | None = None,
    layer: LayerLevel | None = None,
    model: ModelLevel | None = None,
    routing: RoutingLevel | None = None,
) -> tuple[Check, ...]:
    """Of levels that were measured; of nodes the worst of each op, and all that are further from the truth. What has no bound
    is not there."""
    checks: list[Check] = []
    if op is not None:
        checks += _of_ops(op)
    if layer is not None:
        checks += _of_layers("layer", layer, bounds.hidden, bounds.beside)
    if model is not None:
        checks += _of_model("model", model, bounds)
    if routing is not None:
        checks += _of_routing(routing, bounds)
        replayed = routing.replayed
        if replayed is not None and replayed.layer is not None:
            checks += _of_layers("routing", replayed.layer, bounds.replayed_hidden, bounds.beside, REPLAYED)
        if replayed is not None and replayed.model is not None:
            checks += _of_model("routing", replayed.model, bounds, REPLAYED)
    return tuple(check for check in checks if _says_something(check))


def _says_something(check: Check) -> bool:
    """Whether a value could be beyond the bound."""
    return check.bound < float("inf") if check.at_most else check.bound > 0


def _of_ops(level: OpLevel) -> Iterator[Check]:
    for op in dict.fromkeys(case.op for case in level.cases):
        mine = [case for case in level.cases if case.op == op]
        failed = [case for case in mine if not case.no_further]
        for case in failed or [max(mine, key=_lower_end)]:
            yield _of_case(case)


def _lower_end(case: OpCase) -> float:
    return case.interval[0] if case.interval is not None else 0.0


def _of_case(case: OpCase) -> Check:
    """What failed first, or the ratio."""
    first, second = case.errors.values()
    checks = held(case.op, first, second, case.interval)
    told = next((each for each in checks if not each.passed), checks[0])
    subject = f"{case.node} {case.output}, {case.case}"
    return Check("op", told.name, subject, told.value, told.bound, told.passed)


def _of_layers(level: str, found: LayerLevel, hidden: float, beside: float, prefix: str = "") -> Iterator[Check]:
    whole = {each.program: [max(row) for row in each.relative] for each in found.programs}
    for name, errors in whole.items():
        at = max(range(len(errors)), key=errors.__getitem__)
        yield _at_most(level, f"{prefix}relative error", f"{name}, {found.places[at]}", errors[at], hidden)
    if len(whole) == 2 and hidden < float("inf"):
        first, second = whole.values()
        floor = hidden / 100  # errors this small are nobody's concern
        ratios = [a / max(b, floor) for a, b in zip(first, second, strict=True)]
        at = max(range(len(ratios)), key=ratios.__getitem__)
        yield _at_most(level, f"{prefix}error over the other program's", found.places[at], ratios[at], beside)


def _of_model(level: str, found: ModelLevel, bounds: Bounds, prefix: str = "") -> Iterator[Check]:
    for each in found.programs:
        yield _at_most(level, f"{prefix}mean KL", each.program, each.mean_kl, bounds.kl)
        yield _at_least(level, f"{prefix}top-1 agreement", each.program, each.top1, bounds.top1)
        if found.reference_perplexity == found.reference_perplexity:
            increase = each.perplexity / found.reference_perplexity - 1
            yield _at_most(level, f"{prefix}increase of perplexity", each.program, increase, bounds.perplexity)
    if found.between is not None:
        yield _at_most(level, f"{prefix}KL between the programs", "", found.between.mean_kl, bounds.between)
    margins = [
        (each.margin, each.program) for text in found.greedy for each in text.programs if each.margin is not None
    ]
    if margins:
        margin, program = max(margins)
        yield _at_most(level, f"{prefix}margin where greedy texts part", program, margin, bounds.tie)


def _of_routing(found: RoutingLevel, bounds: Bounds) -> Iterator[Check]:
    total = max(1, len(found.layers) * len(found.tokens))
    for each in found.programs:
        yield _at_most("routing", "share of tokens routed otherwise", each.program, each.rerouted, bounds.rerouted)
        beyond = len({(flip.layer, flip.token) for flip in each.flips if not flip.within}) / total
        yield _at_most("routing", "of them beyond a tie", each.program, beyond, bounds.beyond_ties)


def _at_most(level: str, name: str, subject: str, value: float, bound: float) -> Check:
    return Check(level, name, subject, value, bound, value <= bound)


def _at_least(level: str, name: str, subject: str, value: float, bound: float) -> Check:
    return Check(level, name, subject, value, bound, value >= bound, at_most=False)
