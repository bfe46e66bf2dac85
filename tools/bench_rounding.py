"""How far apart the same quantized graph comes out where only last bits differ: computed in float32 and in float16.

    python tools/bench_rounding.py --model_dir tests/data/tiny-mixtral

prints for each format the mean Kullback-Leibler divergence (nats a token, held-out text) between the two, on ONNX Runtime
without plugins, and from Hugging Face's float32 model. Where activations are rounded to codes, a difference of a last bit becomes
one of a whole step now and then: plugins and plain operators cannot be nearer than that either, however exact both are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moecompiler.atomic import write_json_atomic
from moecompiler.backends.onnxruntime_program import WeightCache
from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import ExportOptions, ModelConfig, load_config
from moecompiler.errors import UserError
from moecompiler.export import export_rank
from moecompiler.mapping import Mapping as RankMapping
from moecompiler.passes.pipelines import PLUGINS, named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.tools.bench_quantized import FORMATS, calibration_of, logits_of, read_text, with_static_scales
from moecompiler.validation.difference import kl_divergence, log_softmax

DTYPES = ("float32", "float16")


def measure(
    config: ModelConfig,
    weights: WeightCache,
    tokens: np.ndarray,
    formats: Mapping[str, QuantizationRecipe | None],
    length: int,
) -> list[dict[str, float | str]]:
    """A row for each format; ``tokens [windows, length]``. The first format is the reference that divergences are from."""
    found: dict[tuple[str, str], np.ndarray] = {}
    for dtype in DTYPES:
        options = ExportOptions(dtype, max_seq_len=length, all_logits=True)
        program = export_rank(config, RankMapping.create(), 0, options)
        for name, recipe in formats.items():
            made, _ = run_passes(named_pipelines(recipe)[PLUGINS], program)
            found[dtype, name] = log_softmax(logits_of(made, weights, tokens).astype(np.float32))
    exact = found[DTYPES[0], next(iter(formats))]
    return [
        {
            "format": name,
            "between": float(kl_divergence(found["float32", name], found["float16", name]).mean()),
            "from_float32": float(kl_divergence(exact, found["float32", name]).mean()),
        }
        for name in formats
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="held-out text (default: heldout.txt beside the checkpoint)")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--output", type=Path, help="JSON of all rows")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.model_dir)
        source = open_checkpoint(options.model_dir, config)
        text = options.text or options.model_dir / "heldout.txt"
        tokens = read_text(options.model_dir, text, config.vocab_size, options.windows, options.length)
        formats = FORMATS | with_static_scales(config, calibration_of(config, source, options.length))
        rows = measure(config, WeightCache(source), tokens, formats, options.length)
    except UserError as error:
        parser.error(str(error))
    print("| format | float32 against float16 | from float32 |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {row['format']} | {row['between']:.1e} | {row['from_float32']:.1e} |")
    if options.output:
        write_json_atomic(options.output, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
