"""Verb ``passes bisect``: the first pass, and the first single rewrite, that breaks a check."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from moecompiler.errors import UserError
from moecompiler.passes.selection import label
from moecompiler.tools import options as opt
from moecompiler.tools.flags import SelectionFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.passes.probes import write_probe
from moecompiler.tools.passes.target import Target, for_target, open_subject
from moecompiler.tools.passes.verify import Seed

if TYPE_CHECKING:
    from moecompiler.debugging.bisect import Culprit, Probe
    from moecompiler.debugging.subject import Subject

Command = Annotated[
    str | None,
    typer.Option(
        "--command",
        help="A check of your own: exit status 0 is good. {} stands for the probe's folder, which holds rankN.onnx (or"
        " model.onnx) and weights for ONNX Runtime, and, of an export, an engine directory in engine/.",
    ),
]
ReduceTo = Annotated[
    Path | None, typer.Option("--reduce_to", help="Also write the folder that reproduces it, as `passes reduce` does.")
]


@grouped
def bisect(
    target: Target,
    passes: SelectionFlags,
    command: Command = None,
    seed: Seed = 0,
    reduce_to: ReduceTo = None,
    as_json: opt.Json = False,
) -> None:
    """Find the first pass, then the first rewrite, after which a check fails: numbers within tolerance, or any command."""
    from moecompiler.debugging.bisect import bisect as search

    subject = open_subject(target, seed)
    passes = for_target(passes, target)
    steps = passes.selection.passes()
    errors = Console(stderr=True, highlight=False)
    check = accuracy_check(subject) if command is None else _by_command(command, subject, target)

    def told(probe: Probe) -> bool:
        good = check(probe)
        errors.print(f"{'good' if good else 'bad '}: {_made(probe)}", style="dim")
        return good

    culprit = search(subject, steps, told)
    if reduce_to is not None:
        from moecompiler.tools.passes.reduce import write_reduced

        write_reduced(subject, passes, culprit, reduce_to)
    if as_json:
        print(json.dumps(culprit_json(culprit), indent=2))
    else:
        print(describe(culprit))


def describe(culprit: Culprit) -> str:
    """The pass, the rewrite and where it is, one line each."""
    step, change = label(culprit.index, culprit.name), culprit.change
    found = f"pass {step} breaks the check ({culprit.probes} probes)" if culprit.probes else f"pass {step}"
    if change is None:
        return f"{found}, without a rewrite of its own"
    first = "first by rewrite" if culprit.probes else "rewrite"
    where = f"at {change.node}, module {change.module or '(none)'}"
    return f"{found}\n{first} {change.number} of rank {culprit.rank}: {change.what}\n{where}"


def culprit_json(culprit: Culprit) -> dict[str, Any]:
    change = culprit.change
    return {
        "pass": label(culprit.index, culprit.name),
        "rank": culprit.rank,
        "rewrite": change
        and {"number": change.number, "what": change.what, "node": change.node, "module": change.module},
        "probes": culprit.probes,
    }


def _made(probe: Probe) -> str:
    done = probe.results[0]
    count = sum(result.matches for results in probe.results for result in results)
    return f"{label(len(done), done[-1].name) if done else label(0, 'given')}, {count} rewrites"


def accuracy_check(subject: Subject) -> Callable[[Probe], bool]:
    """Whether the numbers are, within tolerance, those before any pass, with the numbers that codes stand for where weights are
    quantized."""
    from moecompiler.debugging.unquantized import quantized_as
    from moecompiler.quantized import formats
    from moecompiler.validation.difference import outputs_differ
    from moecompiler.validation.tolerances import for_formats

    given = subject.load()
    reference = subject.run(given)

    def check(probe: Probe) -> bool:
        found = formats(probe.programs)
        expected = subject.run(quantized_as(given, probe.programs)) if found else reference
        return outputs_differ(subject.run(probe.programs), expected, for_formats(subject.tolerance, found)).passed

    return check


def _by_command(command: str, subject: Subject, target: Path) -> Callable[[Probe], bool]:
    """Whether a command ends with status 0, given each probe's own folder. Raises: UserError where it cannot be started."""
    words = shlex.split(command)
    if not words:
        raise UserError("--command: is empty")

    def check(probe: Probe) -> bool:
        with tempfile.TemporaryDirectory(prefix="moecompiler-probe-") as folder:
            write_probe(Path(folder), probe.programs, subject, target)
            arguments = [word.replace("{}", folder) for word in words]
            try:
                done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            except OSError as error:
                raise UserError(f"--command {words[0]}: cannot be started: {error.strerror or error}") from None
            sys.stderr.write(done.stdout + done.stderr)
            return done.returncode == 0

    return check
