"""The command line's options of quantization; the others are in ``options``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_PANEL = "Quantization"


class WeightOnlyPrecision(StrEnum):
    """What TensorRT-LLM's ``--weight_only_precision`` takes."""

    int8 = "int8"
    int4 = "int4"


class QFormat(StrEnum):
    """What TensorRT-LLM's ``quantize.py --qformat`` takes, of what there is here."""

    full_prec = "full_prec"
    fp8 = "fp8"
    int8_wo = "int8_wo"
    int4_wo = "int4_wo"
    int4_awq = "int4_awq"
    nvfp4 = "nvfp4"


class KVCacheDType(StrEnum):
    """``auto``: the model's."""

    auto = "auto"
    fp8 = "fp8"
    int8 = "int8"


class Switch(StrEnum):
    """As TensorRT-LLM's ``trtllm-build`` has it."""

    enable = "enable"
    disable = "disable"


KVCacheDTypeOption = Annotated[
    KVCacheDType,
    typer.Option(
        "--kv_cache_dtype",
        metavar="TYPE",
        help="Of keys and values: auto (the model's), fp8 or int8, by scales of each layer.",
        rich_help_panel=_PANEL,
    ),
]
UseFp8ContextFmha = Annotated[
    Switch,
    typer.Option(
        "--use_fp8_context_fmha",
        metavar="SWITCH",
        help="enable: prefill's attention multiplies FP8 numbers; goes with --kv_cache_dtype fp8.",
        rich_help_panel=_PANEL,
    ),
]
QFormatOption = Annotated[
    QFormat | None,
    typer.Option(
        "--qformat",
        metavar="FORMAT",
        help="Quantize attention and experts: " + ", ".join(QFormat) + ".",
        rich_help_panel=_PANEL,
    ),
]
Scales = Annotated[
    Path | None,
    typer.Option(
        "--scales",
        metavar="PATH",
        help="Static scales: of `calibrate`, or in a checkpoint of ModelOpt, compressed-tensors or TensorRT-LLM.",
        rich_help_panel=_PANEL,
    ),
]
UseWeightOnly = Annotated[
    bool,
    typer.Option("--use_weight_only", help="Quantize the weights of attention and experts.", rich_help_panel=_PANEL),
]
WeightOnlyPrecisionOption = Annotated[
    WeightOnlyPrecision | None,
    typer.Option(
        "--weight_only_precision",
        metavar="FORMAT",
        help="int8 (default): a scale for each row; int4: one for each group of a row.",
        rich_help_panel=_PANEL,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group_size", help="Weights of a row that share a scale, for int4 (default: 128).", rich_help_panel=_PANEL
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--quantization",
        metavar="FILE",
        help="YAML or JSON: which weights are quantized how, by name pattern.",
        rich_help_panel=_PANEL,
    ),
]
