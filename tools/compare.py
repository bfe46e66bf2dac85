"""Verb ``compare``: is the plugin right? One model's engines with plugins and without, or two artifacts of one model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from moecompiler.errors import UserError
from moecompiler.tools import options as opt
from moecompiler.tools.comparison import options as own
from moecompiler.tools.groups import grouped

if TYPE_CHECKING:
    from moecompiler.comparison.result import Result
    from moecompiler.tools.comparison.request import Request

DIFFERENT = 1


@grouped
def compare(
    directories: own.Directories,
    what: own.WhatFlags,
    text: own.TextFlags,
    engines: own.EngineChoice,
    output: own.OutputFlags,
    as_json: opt.Json = False,
) -> int:
    """Compare plugins with the plain graph and PyTorch: nodes, layers, logits and routing, with a report and a verdict."""
    from moecompiler.tools.comparison.request import parse_fail_on, parse_levels, parse_ops

    levels, failing, ops = parse_levels(what.level), parse_fail_on(output.fail_on), parse_ops(what.ops)
    text.check()
    if len(directories) > 2 and not what.matrix:
        raise UserError(f"compare takes one directory or two, not {len(directories)}; --matrix takes many")
    errors = Console(stderr=True)
    with errors.status("comparing") if errors.is_terminal else nullcontext() as shown:

        def told(doing: str) -> None:
            if shown is not None:
                shown.update(f"comparing: {doing}")

        def request(work_dir: Path) -> Request:
            return own.request_of(what, text, engines, levels, ops, work_dir)

        if what.matrix:
            return _matrix(directories, request, engines, output, failing, told, as_json=as_json)
        first = directories[0].absolute()
        work = output.work_dir or first.with_name(f"{first.name}.compare")
        result = _compared(directories, request(work), engines, what.bisect, told)
    from moecompiler.comparison.report.write import write_report

    page = write_report(result, output.output_dir or work / "report")
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(result.to_json(), indent=1, allow_nan=False))
    else:
        show(result, page)
    return DIFFERENT if {*result.failed_levels()} & {*failing} else 0


def _compared(
    directories: list[Path],
    request: Request,
    engines: own.EngineChoice,
    bisect: bool | None,
    told: Callable[[str], None],
) -> Result:
    """``bisect``: None where something fails."""
    from moecompiler.tools.comparison.culprits import find_culprits
    from moecompiler.tools.comparison.request import parse_layers
    from moecompiler.tools.comparison.run import measure, prepare
    from moecompiler.tools.comparison.sides import two_artifacts, with_and_without_plugins

    flags, notes = engines.flags(), list[str]()
    if len(directories) == 2:
        sides = two_artifacts((directories[0], directories[1]), request.work_dir, flags, told)
        if "op" in request.levels:
            request = replace(request, levels=tuple(each for each in request.levels if each != "op"))
            notes.append("the op level compares two programs of the same graphs: left out of two artifacts")
        if not request.levels:
            raise UserError("--level op: compares two programs of the same graphs; give one directory")
    else:
        chosen, whole = engines.backend is not None, {*request.levels} != {"op"}
        sides = with_and_without_plugins(
            directories[0].absolute(), request.work_dir, flags, told, chosen_backend=chosen, whole=whole
        )
    layers = parse_layers(request.layers_text, sides[0].job.model.num_hidden_layers)
    measuring = prepare(sides, replace(request, layers=layers), told)
    measuring.notes[:0] = notes
    result = measure(measuring)
    if len(directories) == 1 and (bisect or (bisect is None and not result.passed)):
        try:
            found = find_culprits(measuring, result, told)
            result = replace(result, bisection=found)
        except UserError as error:
            if bisect:
                raise
            measuring.notes.append(str(error))
        result = replace(result, notes=tuple(measuring.notes))
    return result


def _matrix(
    directories: list[Path],
    request: Callable[[Path], Request],
    engines: own.EngineChoice,
    output: own.OutputFlags,
    failing: tuple[str, ...],
    told: Callable[[str], None],
    *,
    as_json: bool,
) -> int:
    """Each directory by itself, and all in one table."""
    from moecompiler.comparison.matrix import artifact_names, matrix_of
    from moecompiler.comparison.report.matrix import write_matrix

    base = output.work_dir or directories[0].absolute().with_name("matrix.compare")
    results = {}
    for name, directory in zip(artifact_names(directories), directories, strict=True):
        results[name] = _compared([directory], request(base / name), engines, False, told)
        for note in results[name].notes:
            print(f"note: {name}: {note}", file=sys.stderr)
    page = write_matrix(results, output.output_dir or base / "report")
    failed = {name: result.failed_levels() for name, result in results.items()}
    if as_json:
        print(json.dumps(matrix_of(results).to_json(), indent=1, allow_nan=False))
    else:
        for name, levels in failed.items():
            print(f"{name}: {'beyond bounds: ' + ', '.join(levels) if levels else 'within bounds'}")
        print(f"report: {page}")
    return DIFFERENT if any({*levels} & {*failing} for levels in failed.values()) else 0


def show(result: Result, page: Path) -> None:
    """The checks, those that did not pass last; which plugins it takes; and where the report is."""
    for check in sorted(result.verdict, key=lambda each: not each.passed):
        sign, mark = ("<=" if check.at_most else ">="), ("ok  " if check.passed else "FAIL")
        subject = f", {check.subject}" if check.subject else ""
        print(f"{mark} {check.level}: {check.name}{subject}: {check.value:.3g} ({sign} {check.bound:.3g})")
    if result.bisection is not None:
        print(f"it takes the plugins: {', '.join(result.bisection.culprits)}")
        print(f"each by itself, to be run: {result.bisection.folder}")
    failed = result.failed_levels()
    print(f"{'BEYOND BOUNDS: ' + ', '.join(failed) if failed else 'within bounds'}; report: {page}")
