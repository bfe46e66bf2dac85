"""The command line's options of calibration; the others are in ``options``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_PANEL = "Calibration"


class Device(StrEnum):
    """Where torch calculates."""

    cpu = "cpu"
    cuda = "cuda"


CalibSize = Annotated[int, typer.Option("--calib_size", help="How many samples to run.", rich_help_panel=_PANEL)]
CalibDataset = Annotated[
    Path | None,
    typer.Option(
        "--calib_dataset",
        help="Text: a file, a .jsonl, a folder of these, or a data set saved to disk (default: the package's own).",
        rich_help_panel=_PANEL,
    ),
]
CalibMaxSeqLength = Annotated[
    int | None,
    typer.Option(
        "--calib_max_seq_length",
        help="Most tokens of a sample (default: 512, or as many as the model takes).",
        rich_help_panel=_PANEL,
    ),
]
CalibMinTokens = Annotated[
    int | None,
    typer.Option(
        "--calib_min_tokens",
        help="An expert that gets fewer is fed all (default: a tenth of an equal share, at most 256).",
        rich_help_panel=_PANEL,
    ),
]
TokenizerDir = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer_dir", help="Folder of the tokenizer (default: the checkpoint's).", rich_help_panel=_PANEL
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="cpu or cuda.", rich_help_panel=_PANEL)]
