"""The command line's options of ``plan``; those that it shares with other verbs are in ``options``."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "GPUs"

Gpus = Annotated[int, typer.Option("--gpus", min=1, help="How many GPUs there are.", rich_help_panel=_PANEL)]
GpuName = Annotated[
    str, typer.Option("--gpu", help="Their kind: a100, l40s, h100, h200 or b200.", rich_help_panel=_PANEL)
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu_memory", metavar="SIZE", help="Of each: 80GB, 79.6GiB (default: that kind's).", rich_help_panel=_PANEL
    ),
]
GpusPerNode = Annotated[
    int, typer.Option("--gpus_per_node", min=1, help="GPUs of a node, which NVLink connects.", rich_help_panel=_PANEL)
]
Network = Annotated[
    float,
    typer.Option(
        "--network", metavar="GB/S", help="Between nodes, of each GPU, one way, in GB/s.", rich_help_panel=_PANEL
    ),
]
