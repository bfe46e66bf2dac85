"""Which plugins make a comparison fail: its verdict on engines with fewer and fewer of them, and folders that reproduce it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from moecompiler.artifact import Artifact
from moecompiler.atomic import fingerprint
from moecompiler.comparison.bisect import Found, Judgement
from moecompiler.comparison.ddmin import Outcome
from moecompiler.comparison.result import OOTB, PLUGINS, Bisection, Check, Probe, Result
from moecompiler.comparison.verdict import verdict
from moecompiler.errors import UserError
from moecompiler.plugin_switches import PluginSwitches
from moecompiler.tools.comparison.bisection import bisect_plugins, tactics_of
from moecompiler.tools.comparison.measure import (
    Measuring,
    measure_layer_level,
    measure_model_level,
    measure_routing_level,
    programs_of,
)
from moecompiler.tools.comparison.reduced import write_reduced
from moecompiler.tools.comparison.sides import Side

_JUDGED = ("model", "layer", "routing")  # of the levels that failed, the first decides: it takes the least work
_GREEDY = "margin where greedy texts part"


def find_culprits(measuring: Measuring, result: Result, told: Callable[[str], None]) -> Bisection:
    """The smallest set of plugins for which ``result`` fails, and each of them reduced, in ``reduce`` of the work directory.

    What failed at the op level alone is known already: nodes are compared by themselves there. Else each probe is a real engine,
    measured as ``measuring`` did and judged by the same bounds at the level that failed.

    Raises: UserError where the sides are not one model with plugins and without, nothing failed, or plugins are not the cause.
    """
    first, second = measuring.sides
    if (first.name, second.name) != (PLUGINS, OOTB) or first.source is None:
        raise UserError("bisect: two artifacts have no plugins to switch: give one directory")
    level = next((each for each in _JUDGED if each in result.failed_levels()), None)
    if level is None:
        culprits, probes, check = _of_ops(result), tuple[Probe, ...](), "op: further from the truth than the body"
    else:
        names = {each.name for each in _failed(result.verdict, level)}
        check = f"{level}: {', '.join(sorted(names))}"
        found = _search(measuring, level, names, check, told)
        culprits, probes = tuple(node.name for node in found.culprits), found.probes
        measuring.notes += _notes(found)
    folder = measuring.request.work_dir / "reduce"
    return Bisection(check, culprits, probes, str(folder) if _reduced(measuring, culprits, folder, told) else "")


def _of_ops(result: Result) -> tuple[str, ...]:
    cases = result.op.cases if result.op is not None else ()
    culprits = tuple(dict.fromkeys(case.node for case in cases if not case.no_further))
    if not culprits:
        raise UserError("bisect: nothing is beyond bounds: there is nothing to find")
    return culprits


def _failed(checks: tuple[Check, ...], level: str) -> list[Check]:
    """Those that say something of plugins."""
    found = [each for each in checks if each.level == level and not each.passed and not each.subject.startswith(OOTB)]
    if not found:
        raise UserError(f"bisect: at the {level} level the graph without plugins is beyond bounds: it is not a plugin")
    return found


def _search(measuring: Measuring, level: str, names: set[str], check: str, told: Callable[[str], None]) -> Found:
    first, second = measuring.sides
    assert first.source is not None
    wants_greedy = all(name.endswith(_GREEDY) for name in names)
    request = replace(
        measuring.request,
        prompts=measuring.request.prompts if wants_greedy else 0,
        replay=any(name.startswith("replayed, ") for name in names),
    )
    engine_runs = {name: run for name, run in measuring.engine_runs().items() if name == second.name}
    watched = {} if level == "model" else {second.name: measuring.watched_runs()[second.name]}

    def judge(engines: Artifact, switches: PluginSwitches) -> Judgement:
        side = Side(first.name, first.label, engines, first.source, switches)
        probe = replace(
            measuring,
            sides=(side, second),
            request=request,
            told=lambda what: None,
            notes=[],
            _engine_runs=dict(engine_runs),
            _runs=dict(watched),
        )
        checks = [each for each in _checks(probe, level) if each.name in names and not each.subject.startswith(OOTB)]
        passed = all(each.passed for each in checks)
        return Judgement(Outcome.PASS if passed else Outcome.FAIL, max(map(_share, checks)))

    def heard(probe: Probe) -> None:
        told(f"{len(probe.plugins)} plugins: {probe.outcome}")

    judged = f"{check} {_inputs_key(measuring)}"
    return bisect_plugins(first.engines, first.source, judge, judged, measuring.request.work_dir / "bisect", heard)


def _inputs_key(measuring: Measuring) -> str:
    """What the same engine's verdict depends on."""
    scenario = measuring.scenario
    run = scenario.tokens.tolist(), scenario.prompt_lengths, scenario.decode_steps
    return fingerprint(run, asdict(measuring.bounds), measuring.request.prompts, measuring.request.output_len)


def _checks(probe: Measuring, level: str) -> tuple[Check, ...]:
    match level:
        case "model":
            return verdict(probe.bounds, model=measure_model_level(probe))
        case "layer":
            return verdict(probe.bounds, layer=measure_layer_level(probe))
    return verdict(probe.bounds, routing=measure_routing_level(probe))


def _share(check: Check) -> float:
    """Of its bound: above 1 is beyond it."""
    value, bound = (check.value, check.bound) if check.at_most else (check.bound, check.value)
    return value / bound if bound else float("inf") if value else 0.0


def _notes(found: Found) -> list[str]:
    notes = []
    if not found.minimal:
        notes.append(f"bisect: ended at its limit of engines; {len(found.culprits)} nodes are left, not the fewest")
    if found.others is Outcome.FAIL:
        notes.append("bisect: without these plugins the others fail too: there are more culprits")
    if unresolved := sum(probe.outcome == Outcome.UNRESOLVED for probe in found.probes):
        notes.append(f"bisect: {unresolved} engine(s) could not be built or run, and say nothing")
    return notes


def _reduced(measuring: Measuring, culprits: tuple[str, ...], folder: Path, told: Callable[[str], None]) -> bool:
    """Whether the folders could be written; a note says why not."""
    first = measuring.sides[0]
    told("reducing")
    try:
        write_reduced(
            culprits,
            programs_of(first),
            first.job.mapping,
            measuring.reader,
            measuring.scenario.steps(),
            first.backend,
            folder,
            tactics_of(first.engines),
            measuring.request.threads,
        )
    except UserError as error:
        measuring.notes.append(f"the culprits are known, but not reduced to folders: {error}")
        return False
    return True
