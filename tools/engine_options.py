"""The command line's options of backends with plugins; the others are in ``options``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moecompiler.tools.options import PluginDType

_PANEL = "Engine"


class MoeWeights(StrEnum):
    """Where an engine's expert weights are; see ``BuildSettings``."""

    auto = "auto"
    external = "external"
    all = "all"
    engine = "engine"


MoePlugin = Annotated[
    PluginDType,
    typer.Option(
        "--moe_plugin",
        metavar="TYPE",
        help="Short for --plugins moe=…: auto, disable, float16 or bfloat16.",
        rich_help_panel=_PANEL,
    ),
]
GptAttentionPlugin = Annotated[
    PluginDType,
    typer.Option(
        "--gpt_attention_plugin",
        metavar="TYPE",
        help="Short for --plugins attention=…: auto, disable, float16 or bfloat16.",
        rich_help_panel=_PANEL,
    ),
]
Plugins = Annotated[
    str,
    typer.Option(
        "--plugins",
        metavar="WHICH",
        help="on, off, auto; by op, moe=off,attention=on; by layer, moe@layers.3=off.",
        rich_help_panel=_PANEL,
    ),
]
PluginTactics = Annotated[
    str,
    typer.Option(
        "--plugin_tactics",
        metavar="NAME,…",
        help="For backend onnxruntime: plans of interpreted plugins (default: each op's first).",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
MoeWeightsOption = Annotated[
    MoeWeights,
    typer.Option(
        "--moe_weights",
        metavar="WHERE",
        help="Expert weights: external (bound at run time), engine (baked in) or auto; all: every weight external, plans shared.",
        rich_help_panel=_PANEL,
    ),
]
MaxNumTokens = Annotated[
    int | None,
    typer.Option("--max_num_tokens", help="Most tokens of a step; longer prefills are split.", rich_help_panel=_PANEL),
]
ComputeCapability = Annotated[
    str,
    typer.Option(
        "--compute_capability",
        metavar="X.Y,…",
        help="For backend tensorrt-rtx: of the cards to build for (default: 8.9,12.0).",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
