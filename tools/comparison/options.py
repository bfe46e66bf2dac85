"""The options of ``compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moecompiler.errors import UserError
from moecompiler.tools.flags import EngineFlags

if TYPE_CHECKING:
    from moecompiler.tools.comparison.request import Request

_WHAT, _TEXT, _BUILD, _OUT = "What to compare", "Text", "Engines", "Output"

Directories = Annotated[
    list[Path],
    typer.Argument(
        metavar="DIR [DIR]",
        help="What `compile`, `build`, `optimize` or `export` wrote; or two, or with --matrix many.",
    ),
]


@dataclass(frozen=True)
class WhatFlags:
    """Which levels, of what."""

    level: Annotated[
        str, typer.Option("--level", metavar="LEVEL,…", help="op, layer, model, routing.", rich_help_panel=_WHAT)
    ] = "op,layer,model,routing"
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="N,…", help="Layers of the op level: 0,3 or 0-3.", rich_help_panel=_WHAT),
    ] = None
    ops: Annotated[
        str | None,
        typer.Option("--ops", metavar="OP,…", help="Ops of the op level: moe,attention,….", rich_help_panel=_WHAT),
    ] = None
    replay: Annotated[
        bool, typer.Option("--replay/--no_replay", help="Also with routing replayed.", rich_help_panel=_WHAT)
    ] = True
    bisect: Annotated[
        bool | None,
        typer.Option(
            "--bisect/--no_bisect",
            help="Find the smallest set of plugins that fails (default: where something does).",
            rich_help_panel=_WHAT,
        ),
    ] = None
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Each DIR by itself, and all in one table.", rich_help_panel=_WHAT),
    ] = False


@dataclass(frozen=True)
class TextFlags:
    """What is run."""

    text: Annotated[
        Path | None,
        typer.Option(
            "--text", help="Held-out text (default: heldout.txt beside the checkpoint).", rich_help_panel=_TEXT
        ),
    ] = None
    tokenizer_dir: Annotated[
        Path | None,
        typer.Option("--tokenizer_dir", help="Folder of the tokenizer (default: the engine's).", rich_help_panel=_TEXT),
    ] = None
    tokens: Annotated[int, typer.Option("--tokens", help="About how many to run.", rich_help_panel=_TEXT)] = 128
    prompts: Annotated[int, typer.Option("--prompts", help="Greedy texts.", rich_help_panel=_TEXT)] = 2
    output_len: Annotated[int, typer.Option("--output_len", help="Tokens of each.", rich_help_panel=_TEXT)] = 16
    seed: Annotated[int, typer.Option("--seed", help="Of random tokens.", rich_help_panel=_TEXT)] = 0

    def check(self) -> None:
        """Raises: UserError where a number is too small."""
        least = (("--tokens", self.tokens, 8), ("--prompts", self.prompts, 0), ("--output_len", self.output_len, 1))
        for name, value, bound in least:
            if value < bound:
                raise UserError(f"{name} {value}: give {bound} or more")


@dataclass(frozen=True)
class EngineChoice:
    """Engines that are built for the comparison."""

    backend: Annotated[
        str | None, typer.Option("--backend", help="What runs them (default: the engine's).", rich_help_panel=_BUILD)
    ] = None
    plugins: Annotated[
        str,
        typer.Option(
            "--plugins", metavar="WHICH", help="Which nodes are plugins, as for build.", rich_help_panel=_BUILD
        ),
    ] = "auto"
    plugin_tactics: Annotated[
        str,
        typer.Option(
            "--plugin_tactics", metavar="NAME,…", help="Plans of interpreted plugins.", rich_help_panel=_BUILD
        ),
    ] = ""
    max_batch_size: Annotated[
        int, typer.Option("--max_batch_size", help="Of engines built here.", rich_help_panel=_BUILD)
    ] = 4
    threads: Annotated[int, typer.Option("--threads", help="CPU threads (0: all cores).", rich_help_panel=_BUILD)] = 0

    def flags(self) -> EngineFlags:
        """As ``build`` takes them."""
        return EngineFlags(
            backend=self.backend or "onnxruntime",
            plugins=self.plugins,
            plugin_tactics=self.plugin_tactics,
            max_batch_size=self.max_batch_size,
        )


@dataclass(frozen=True)
class OutputFlags:
    """Where results go, and what they mean."""

    work_dir: Annotated[
        Path | None,
        typer.Option("--work_dir", help="Where engines are built (default: DIR.compare).", rich_help_panel=_OUT),
    ] = None
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", help="Where the report goes (default: report in it).", rich_help_panel=_OUT),
    ] = None
    fail_on: Annotated[
        str,
        typer.Option(
            "--fail_on",
            metavar="LEVEL,…",
            help="Levels whose checks give status 1: op, layer, model, routing, any or none.",
            rich_help_panel=_OUT,
        ),
    ] = "any"


def request_of(
    what: WhatFlags,
    text: TextFlags,
    engines: EngineChoice,
    levels: tuple[str, ...],
    ops: tuple[str, ...] | None,
    work_dir: Path,
) -> Request:
    """What the options ask for; layers are read when the model is known."""
    from moecompiler.tools.comparison.request import Request

    return Request(
        levels,
        None,
        what.layers,
        ops,
        text.text,
        text.tokenizer_dir,
        text.tokens,
        text.seed,
        text.prompts,
        text.output_len,
        what.replay,
        engines.threads,
        work_dir,
    )
