"""How good quantized models are: each format's engine on ONNX Runtime against Hugging Face's float32 model, on held-out text.

    python tools/bench_quantized.py --model_dir tests/data/tiny-mixtral

prints a row for each format: perplexity and by how much it is more, the mean Kullback-Leibler divergence from HF's distribution
(nats a token), the share of tokens whose most likely successor is HF's, and the share of (token, layer) that other experts
compute than without quantization; ``--output`` writes the same as JSON. Activations are float32 where a format does not say
otherwise, so that nothing else differs. Static scales are of the package's own text. The model must fit into memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moecompiler.backends.onnxruntime_program import WeightCache, open_program
from moecompiler.calibration.result import Calibration
from moecompiler.calibration.static import with_input_scales
from moecompiler.checkpoint import Source, open_checkpoint
from moecompiler.config import ExportOptions, ModelConfig, load_config
from moecompiler.debugging.observe import feeds_of, run_prefix
from moecompiler.errors import UserError
from moecompiler.export import export_rank
from moecompiler.graph import Program
from moecompiler.mapping import Mapping as RankMapping
from moecompiler.passes.pipelines import PLUGINS, named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.quantization.cache import CacheQuantization
from moecompiler.quantization.recipe import QuantizationRecipe, default_recipe
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, Format, int4
from moecompiler.runtime.prompts import load_tokenizer
from moecompiler.smoothed_checkpoint import FILE, SmoothedCheckpoint
from moecompiler.tools.calibration import samples_of
from moecompiler.tools.flags import CalibrationFlags
from moecompiler.validation.difference import kl_divergence, log_softmax
from moecompiler.validation.quality import load_hf
from moecompiler.validation.scenario import Step

FORMATS: dict[str, QuantizationRecipe | None] = {
    "float32": None,
    "int8": default_recipe(INT8),
    "int4, groups of 128": default_recipe(int4(128)),
    "int4, groups of 64": default_recipe(int4(64)),
    "int4_asymmetric, groups of 128": default_recipe(int4(128, symmetric=False)),
    "int4_asymmetric, groups of 64": default_recipe(int4(64, symmetric=False)),
    "nvfp4": default_recipe(NVFP4),
}
AWQ: dict[str, QuantizationRecipe] = {
    "int4_awq, groups of 128": default_recipe(int4(128)),
    "int4_awq, groups of 64": default_recipe(int4(64)),
    "int4_awq, asymmetric, groups of 64": default_recipe(int4(64, symmetric=False)),
}


def with_static_scales(config: ModelConfig, found: Calibration) -> dict[str, QuantizationRecipe]:
    """The formats that need a calibration: FP8, and caches of codes."""
    attentions = [f"model.layers.{layer}.self_attn" for layer in range(config.num_hidden_layers)]

    def cached(form: Format, *, fp8_context: bool = False) -> QuantizationRecipe:
        scales = tuple(found.cache_scales(name, form.largest) for name in attentions)
        return QuantizationRecipe((), cache=CacheQuantization(form, scales, fp8_context))

    return {
        "fp8": with_input_scales(default_recipe(FP8), config, found.input_scale),
        "KV cache int8": cached(Format.INT8),
        "KV cache fp8": cached(Format.E4M3),
        "KV cache fp8, fp8 prefill": cached(Format.E4M3, fp8_context=True),
    }


@dataclass(frozen=True)
class Row:
    """See the module; ``increase`` is of the perplexity, relative to HF's."""

    format: str
    weight_bytes: int
    perplexity: float
    increase: float
    kl: float
    top1: float
    other_experts: float


@dataclass(frozen=True)
class Text:
    """``tokens [windows, length]``, and HF's log-probabilities ``[windows, length, vocab]``."""

    tokens: np.ndarray
    expected: np.ndarray


def rows_of(
    program: Program, weights: WeightCache, text: Text, formats: Mapping[str, QuantizationRecipe | None]
) -> list[Row]:
    """``program``: a whole model's export, with the logits of all tokens."""
    floats, _ = run_passes(named_pipelines()[PLUGINS], program)
    unchanged = chosen_experts(floats, weights, text.tokens)
    wanted = perplexity(text.expected, text.tokens)
    rows = []
    for name, recipe in formats.items():
        made, _ = run_passes(named_pipelines(recipe)[PLUGINS], program)
        found = log_softmax(logits_of(made, weights, text.tokens))
        mine = perplexity(found, text.tokens)
        rows.append(
            Row(
                name,
                sum(each.nbytes for each in made.weights.values()),
                mine,
                mine / wanted - 1,
                float(kl_divergence(text.expected, found).mean()),
                float((found.argmax(-1) == text.expected.argmax(-1)).mean()),
                float((chosen_experts(made, weights, text.tokens) != unchanged).any(-1).mean()),
            )
        )
    return rows


def perplexity(log_probabilities: np.ndarray, tokens: np.ndarray) -> float:
    """Of each window's tokens but the first."""
    following = np.take_along_axis(log_probabilities[:, :-1], tokens[:, 1:, None], axis=-1)
    return float(np.exp(-following.mean()))


def logits_of(program: Program, weights: WeightCache, tokens: np.ndarray) -> np.ndarray:
    """``[windows, length, vocab]``."""
    session = open_program(program, weights)
    return np.concatenate([session.run(["logits"], _feeds(program, row[None]))[0] for row in tokens])


def chosen_experts(program: Program, weights: WeightCache, tokens: np.ndarray) -> np.ndarray:
    """Which experts each layer chooses for each token, as numbers in ascending order: ``[layers, windows * length, top_k]``."""
    nodes = [node for node in program.model.graph.node if node.op_type.startswith("MoE")]
    seen = [
        run_prefix(program, weights, _feeds(program, row[None]), [node.input[0] for node in nodes]) for row in tokens
    ]
    layers = []
    for node in nodes:
        x = np.concatenate([each[node.input[0]] for each in seen])
        router = weights.value(program.weights[node.input[1]]).numpy()
        (top_k,) = (each.i for each in node.attribute if each.name == "top_k")
        layers.append(np.sort(np.argsort(x @ router.T, axis=-1)[:, -top_k:], axis=-1))
    return np.stack(layers)


def _feeds(program: Program, tokens: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    step = Step(tokens, np.ascontiguousarray(positions), np.full(len(tokens), tokens.shape[1] - 1))
    return feeds_of(program, step, tokens)


def read_text(model_dir: Path, path: Path, vocab_size: int, windows: int, length: int) -> np.ndarray:
    """The text's first tokens, ``[windows, length]``. Raises: UserError where it is too short."""
    ids = load_tokenizer(model_dir, vocab_size).encode(path.read_text(encoding="utf-8"))
    count = min(windows, len(ids) // length)
    if count == 0:
        raise UserError(f"{path}: has {len(ids)} tokens, fewer than one window of {length}")
    return np.array(ids[: count * length], np.int64).reshape(count, length)


def measure(model_dir: Path, path: Path, windows: int, length: int) -> list[Row]:
    import torch

    config = load_config(model_dir)
    source = open_checkpoint(model_dir, config)
    tokens = read_text(model_dir, path, config.vocab_size, windows, length)
    model = load_hf(config, source.identity(), source)
    with torch.inference_mode():
        expected = np.concatenate([log_softmax(model(torch.from_numpy(row[None])).logits.numpy()) for row in tokens])
    options = ExportOptions("float32", max_seq_len=length, all_logits=True)
    program = export_rank(config, RankMapping.create(), 0, options)
    formats = FORMATS | with_static_scales(config, calibration_of(config, source, length))
    told = Text(tokens, expected)
    rows = rows_of(program, WeightCache(source), told, formats)
    for name, recipe in AWQ.items():
        rows += rows_of(program, WeightCache(smoothed(config, source, length, recipe)), told, {name: recipe})
    return rows


def smoothed(config: ModelConfig, source: Source, length: int, recipe: QuantizationRecipe) -> Source:
    """With the scales that AWQ's search finds on the package's own text."""
    from moecompiler.calibration.awq import search
    from moecompiler.calibration.streaming import Settings

    samples = samples_of(config, source.identity(), CalibrationFlags(), length, [])
    with tempfile.TemporaryDirectory() as folder:
        found = search(config, source, samples, Settings("float32"), recipe, Path(folder), {})
    return SmoothedCheckpoint(source, found, Path(FILE), "")


def calibration_of(config: ModelConfig, source: Source, length: int) -> Calibration:
    """On the package's own text, in pieces of ``length`` tokens."""
    from moecompiler.calibration.streaming import Settings, calibrate

    samples = samples_of(config, source.identity(), CalibrationFlags(), length, [])
    with tempfile.TemporaryDirectory() as folder:
        return calibrate(config, source, samples, Settings("float32"), Path(folder))


def table(rows: Sequence[Row]) -> str:
    lines = ["| format | weights | perplexity | more | KL | top-1 | other experts |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row.format} | {row.weight_bytes / 1e6:.1f} MB | {row.perplexity:.4f} | {row.increase:+.2%} | {row.kl:.1e} |"
        f" {row.top1:.2%} | {row.other_experts:.2%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="Folder of a Hugging Face checkpoint.")
    parser.add_argument("--text", type=Path, help="Text to measure on (default: heldout.txt beside the checkpoint).")
    parser.add_argument("--windows", type=int, default=64, help="How many windows of it, at most.")
    parser.add_argument("--length", type=int, default=256, help="Tokens of a window.")
    parser.add_argument("--output", type=Path, help="Also write the rows here, as JSON.")
    arguments = parser.parse_args()
    try:
        text = arguments.text or arguments.model_dir / "heldout.txt"
        rows = measure(arguments.model_dir, text, arguments.windows, arguments.length)
    except (UserError, OSError) as error:
        print(f"bench_quantized: error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
