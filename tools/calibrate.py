"""Verb ``calibrate``: how large a checkpoint's activations get on a text, for static scales."""

from __future__ import annotations

import json
import sys

from rich.table import Table

from moecompiler.calibration.files import FILE, JSON_FILE, to_json
from moecompiler.calibration.result import Calibration
from moecompiler.config import ModelConfig
from moecompiler.tools import options as opt
from moecompiler.tools.calibration import run_calibrate
from moecompiler.tools.flags import CalibrationFlags, GraphFlags, SourceFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.job import resolve_export, resolve_source
from moecompiler.tools.printing import wide_console

MAGNITUDES = ("q, k, v input", "keys", "values", "o input", "router and experts' input", "down input")


@grouped
def calibrate(
    output_dir: opt.OutputDir,
    source: SourceFlags,
    calibration: CalibrationFlags,
    dtype: opt.DataType = opt.DType.auto,
    moe_normalization_mode: opt.NormalizationOption = opt.Normalization.renormalize,
    as_json: opt.Json = False,
) -> None:
    """Run a text through a checkpoint, layer by layer, and note how large activations, keys and values get."""
    config, identity = resolve_source(source)
    export = resolve_export(config, GraphFlags(dtype, moe_normalization_mode))
    notes: list[str] = []
    found = run_calibrate(config, identity, export.dtype, export.normalization_mode, calibration, output_dir, notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(to_json(found), indent=2))
        return
    _print_report(found, config)
    text = found.header["text"]
    print(f"calibrated on {text['tokens']} tokens, {text['samples']} samples: {output_dir}/{FILE}, {JSON_FILE}")


def _print_report(found: Calibration, config: ModelConfig) -> None:
    """Tokens by expert, and the largest magnitudes of each layer."""
    tokens, magnitudes = Table(title="tokens by expert"), Table(title="largest magnitudes")
    experts = range(config.num_local_experts)
    for table, names in ((tokens, map(str, experts)), (magnitudes, MAGNITUDES)):
        for name in ("layer", *names):
            table.add_column(name, justify="right")
    for layer in range(config.num_hidden_layers):
        attention, moe = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.block_sparse_moe"
        each = [found.experts[f"{moe}.experts.{expert}"] for expert in experts]
        tokens.add_row(str(layer), *(f"{expert.tokens}{'*' if expert.fed else ''}" for expert in each))
        amaxes = (
            found.input_amax[f"{attention}.q_proj"],
            found.keys[attention],
            found.values[attention],
            found.input_amax[f"{attention}.o_proj"],
            found.input_amax[f"{moe}.gate"],
            max(found.input_amax[f"{moe}.experts.{expert}.w2"] for expert in experts),
        )
        magnitudes.add_row(str(layer), *(f"{amax:.4g}" for amax in amaxes))
    if fed := sum(each.fed for each in found.experts.values()):
        tokens.caption = f"* too few ({fed} experts): statistics are of all tokens"
    console = wide_console()
    console.print(tokens)
    console.print(magnitudes)
