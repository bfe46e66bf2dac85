"""Verb ``compare``: is the plugin right? One model's engines with plugins and without, or two artifacts of one model."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moecompiler.errors import UserError
from moecompiler.tools import options as opt
from moecompiler.tools.flags import EngineFlags

if TYPE_CHECKING:
    from moecompiler.comparison.result import Result

DIFFERENT = 1
_WHAT, _TEXT, _BUILD, _OUT = "What to compare", "Text", "Engines", "Output"


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR [DIR]", help="What `compile`, `build`, `optimize` or `export` wrote; or two."),
    ],
    level: Annotated[
        str,
        typer.Option("--level", metavar="LEVEL,…", help="op, layer, model and routing.", rich_help_panel=_WHAT),
    ] = "op,layer,model,routing",
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="N,…", help="Layers of the op level: 0,3 or 0-3.", rich_help_panel=_WHAT),
    ] = None,
    ops: Annotated[
        str | None,
        typer.Option("--ops", metavar="OP,…", help="Ops of the op level: moe,attention,….", rich_help_panel=_WHAT),
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay/--no_replay", help="Also with routing replayed.", rich_help_panel=_WHAT)
    ] = True,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", help="Held-out text (default: heldout.txt beside the checkpoint).", rich_help_panel=_TEXT
        ),
    ] = None,
    tokenizer_dir: Annotated[
        Path | None,
        typer.Option("--tokenizer_dir", help="Folder of the tokenizer (default: the engine's).", rich_help_panel=_TEXT),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="About how many to run.", rich_help_panel=_TEXT)] = 128,
    prompts: Annotated[int, typer.Option("--prompts", help="Greedy texts.", rich_help_panel=_TEXT)] = 2,
    output_len: Annotated[int, typer.Option("--output_len", help="Tokens of each.", rich_help_panel=_TEXT)] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Of random tokens.", rich_help_panel=_TEXT)] = 0,
    backend: Annotated[
        str | None, typer.Option("--backend", help="What runs them (default: the engine's).", rich_help_panel=_BUILD)
    ] = None,
    plugins: Annotated[
        str,
        typer.Option(
            "--plugins", metavar="WHICH", help="Which nodes are plugins, as for build.", rich_help_panel=_BUILD
        ),
    ] = "auto",
    plugin_tactics: Annotated[
        str,
        typer.Option(
            "--plugin_tactics", metavar="NAME,…", help="Plans of interpreted plugins.", rich_help_panel=_BUILD
        ),
    ] = "",
    max_batch_size: Annotated[
        int, typer.Option("--max_batch_size", help="Of engines that are built here.", rich_help_panel=_BUILD)
    ] = 4,
    threads: Annotated[int, typer.Option("--threads", help="CPU threads (0: all cores).", rich_help_panel=_BUILD)] = 0,
    work_dir: Annotated[
        Path | None,
        typer.Option("--work_dir", help="Where engines are built (default: DIR.compare).", rich_help_panel=_OUT),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", help="Where the report goes (default: report in it).", rich_help_panel=_OUT),
    ] = None,
    fail_on: Annotated[
        str,
        typer.Option(
            "--fail_on",
            metavar="LEVEL,…",
            help="Levels whose checks give status 1: op, layer, model, routing, any or none.",
            rich_help_panel=_OUT,
        ),
    ] = "any",
    as_json: opt.Json = False,
) -> int:
    """Compare plugins with the plain graph and PyTorch: nodes, layers, logits and routing, with a report and a verdict."""
    from moecompiler.comparison.report.write import write_report
    from moecompiler.tools.comparison.request import Request, parse_fail_on, parse_layers, parse_levels, parse_ops
    from moecompiler.tools.comparison.run import run_comparison
    from moecompiler.tools.comparison.sides import two_artifacts, with_and_without_plugins

    levels, failing = parse_levels(level), parse_fail_on(fail_on)
    if len(directories) > 2:
        raise UserError(f"compare takes one directory or two, not {len(directories)}; --matrix takes many")
    for name, value, least in (("--tokens", tokens, 8), ("--prompts", prompts, 0), ("--output_len", output_len, 1)):
        if value < least:
            raise UserError(f"{name} {value}: give {least} or more")
    first = directories[0].absolute()
    work = work_dir or first.with_name(f"{first.name}.compare")
    engine = EngineFlags(
        backend=backend or "onnxruntime", plugins=plugins, plugin_tactics=plugin_tactics, max_batch_size=max_batch_size
    )
    errors = Console(stderr=True)
    status = errors.status("comparing") if errors.is_terminal else nullcontext()
    with status as shown:

        def told(what: str) -> None:
            if shown is not None:
                shown.update(f"comparing: {what}")

        if len(directories) == 2:
            sides = two_artifacts((directories[0], directories[1]), work, engine, told)
            if "op" in levels:
                levels = tuple(each for each in levels if each != "op")
                print(
                    "note: the op level compares two programs of the same graphs: left out of two artifacts",
                    file=sys.stderr,
                )
        else:
            sides = with_and_without_plugins(first, work, engine, told, chosen_backend=backend is not None)
        wanted = parse_layers(layers, sides[0].job.model.num_hidden_layers)
        request = Request(
            levels,
            wanted,
            parse_ops(ops),
            text,
            tokenizer_dir,
            tokens,
            seed,
            prompts,
            output_len,
            replay,
            threads,
            work,
        )
        result = run_comparison(sides, request, told)
    page = write_report(result, output_dir or work / "report")
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(result.to_json(), indent=1, allow_nan=False))
    else:
        show(result, page)
    return DIFFERENT if set(result.failed_levels()) & set(failing) else 0


def show(result: Result, page: Path) -> None:
    """The checks, those that did not pass last, and where the report is."""
    for check in sorted(result.verdict, key=lambda each: not each.passed):
        sign = "<=" if check.at_most else ">="
        mark = "ok  " if check.passed else "FAIL"
        print(f"{mark} {check.level}: {check.name}, {check.subject}: {check.value:.3g} ({sign} {check.bound:.3g})")
    failed = result.failed_levels()
    print(f"{'no differences beyond bounds' if not failed else 'BEYOND BOUNDS: ' + ', '.join(failed)}; report: {page}")
