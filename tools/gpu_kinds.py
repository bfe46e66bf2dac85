"""The engines that a GPU is asked to show: the shipped model in every type, mapping and format, and full-size models."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

PLUGINS = {"on": "on", "off": "off", "mixed": "on,@layers.1=off"}
MAPPINGS: dict[str, tuple[str, ...]] = {
    "one": (),
    "tp2": ("--tp_size", "2"),
    "ep2": ("--tp_size", "2", "--moe_ep_size", "2"),
    "pp2": ("--pp_size", "2"),
}
RANK_MAPPINGS: dict[str, tuple[str, ...]] = {
    "tp4": ("--tp_size", "4"),
    "ep4": ("--tp_size", "4", "--moe_ep_size", "4"),
    "tp2ep2": ("--tp_size", "4", "--moe_tp_size", "2", "--moe_ep_size", "2"),
    "tp2pp2": ("--tp_size", "2", "--pp_size", "2"),
}
"""More, which ranks are shown with as processes."""


@dataclass(frozen=True)
class Kind:
    """Engines of one model; ``plugins`` is a key of ``PLUGINS``, ``mapping`` one of ``MAPPINGS`` or ``RANK_MAPPINGS``."""

    dtype: str
    plugins: str
    mapping: str

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.plugins}-{self.mapping}"


KINDS = (
    *(Kind(*each) for each in product(("float16", "bfloat16"), ("on", "off"), MAPPINGS)),
    Kind("float16", "mixed", "one"),
)
# what tests go through one after another: all ways of one rank, and one way of each mapping
TESTED = tuple(kind for kind in KINDS if kind.mapping == "one" or (kind.dtype, kind.plugins) == ("float16", "on"))

SCALES = "--scales"
# name → what quantizes the shipped model's weights or cache; SCALES alone: those of a calibration are to be given
QUANTIZED: dict[str, tuple[str, ...]] = {
    "int8": ("--use_weight_only", "--weight_only_precision", "int8"),
    "int4": ("--use_weight_only", "--weight_only_precision", "int4", "--group_size", "64"),
    "awq": ("--qformat", "int4_awq", "--calib_size", "16"),
    "fp8": ("--qformat", "fp8", SCALES),
    "fp8kv": ("--qformat", "fp8", "--kv_cache_dtype", "fp8", "--use_fp8_context_fmha", "enable", SCALES),
    "int8kv": ("--kv_cache_dtype", "int8", SCALES),
    "nvfp4": ("--qformat", "nvfp4"),
}


def compile_quantized(name: str, plugins: str, model_dir: Path, scales: Path, output_dir: Path) -> list[str]:
    """Words of the command line that compile the shipped model, one rank in float16, as ``QUANTIZED`` says; ``scales``: what
    ``calibrate`` wrote."""
    words = compile_shipped(Kind("float16", plugins, "one"), model_dir, output_dir)
    for word in QUANTIZED[name]:
        words += [SCALES, str(scales)] if word == SCALES else [word]
    return words


def compile_shipped(
    kind: Kind, model_dir: Path, output_dir: Path, slots: int = 144, pipeline: str = "plugins"
) -> list[str]:
    """Words of the command line that compile the shipped model, for prompts of up to 64 tokens and ``slots`` in all."""
    limits = ("--max_seq_len", str(slots), "--max_input_len", "64", "--max_batch_size", "8", "--max_num_tokens", "256")
    return [*_compile(kind, output_dir, pipeline), "--model_dir", str(model_dir), *limits]


def compile_full_size(
    kind: Kind, model: str, layers: int, output_dir: Path, slots: int = 256, batch: int = 3
) -> list[str]:
    """Words of the command line that compile layers of ``8x7b`` or ``8x22b`` with dummy weights."""
    limits = ("--max_seq_len", str(slots), "--max_input_len", str(slots * 3 // 4), "--max_batch_size", str(batch))
    return [*_compile(kind, output_dir), "--model", model, "--num_layers", str(layers), *limits]


def _compile(kind: Kind, output_dir: Path, pipeline: str = "plugins") -> list[str]:
    engine = ("--backend", "tensorrt", "--pipeline", pipeline, "--plugins", PLUGINS[kind.plugins])
    what = ("--dtype", kind.dtype, "--moe_weights", "external", *(MAPPINGS | RANK_MAPPINGS)[kind.mapping])
    return ["compile", "--output_dir", str(output_dir), *engine, *what]
