"""Verb ``plan``: how to split a model over GPUs, from its sizes alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moecompiler.config import ModelConfig, load_config
from moecompiler.errors import UserError
from moecompiler.planning.choice import Choice, Plan, choose, reasons
from moecompiler.planning.hardware import Cluster, gpu_named, parse_bytes
from moecompiler.planning.latency import MEASURED_SHARE
from moecompiler.planning.load import Load
from moecompiler.tools import engine_options as eng
from moecompiler.tools import options as opt
from moecompiler.tools import planning_options as plans
from moecompiler.tools import quantization_options as quant
from moecompiler.tools.flags import QuantizationFlags
from moecompiler.tools.groups import grouped
from moecompiler.tools.quantization import recipe_from_flags


@grouped
def plan(
    gpus: plans.Gpus,
    quantization: QuantizationFlags,
    model_dir: opt.ModelDir = None,
    model: opt.Model = None,
    num_layers: opt.NumLayers = None,
    gpu: plans.GpuName = "h100",
    gpu_memory: plans.GpuMemory = None,
    gpus_per_node: plans.GpusPerNode = 8,
    network: plans.Network = 50.0,
    dtype: opt.DataType = opt.DType.auto,
    max_batch_size: opt.MaxBatchSize = 8,
    max_seq_len: opt.MaxSeqLen = None,
    max_num_tokens: eng.MaxNumTokens = None,
    as_json: opt.Json = False,
) -> None:
    """Recommend a mapping onto GPUs: memory per rank and the floor of a decode step; nothing is compiled."""
    config = _config(model_dir, model).with_layers(num_layers)
    cluster = _cluster(gpu, gpu_memory, gpus, gpus_per_node, network)
    load = _load(config, quantization, dtype, max_batch_size, max_seq_len, max_num_tokens)
    choice = choose(config, load, cluster)
    if as_json:
        print(json.dumps(describe(choice, load, cluster), indent=2))
    else:
        _print(choice, load, cluster)


def _config(model_dir: Path | None, model: str | None) -> ModelConfig:
    """Only the config is read."""
    if (model_dir is None) == (model is None):
        raise UserError("give --model_dir, or --model 8x7b, 8x22b or a config.json")
    return load_config(model_dir if model_dir is not None else str(model))


def _cluster(gpu: str, memory: str | None, gpus: int, gpus_per_node: int, network: float) -> Cluster:
    if not 0 < network < math.inf:
        raise UserError(f"--network {network}: give the GB a second of a GPU's connection, say 50")
    card = gpu_named(gpu)
    if memory is not None:
        card = replace(card, memory=parse_bytes(memory, "--gpu_memory"))
    return Cluster(card, gpus, gpus_per_node, network * 1e9)


def _load(
    config: ModelConfig,
    quantization: QuantizationFlags,
    dtype: opt.DType,
    batch: int,
    max_seq_len: int | None,
    max_num_tokens: int | None,
) -> Load:
    from moecompiler.backends.tensorrt_profiles import MAX_NUM_TOKENS

    slots = min(config.max_position_embeddings, 2048) if max_seq_len is None else max_seq_len
    if not 2 <= slots <= config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {slots}: give 2 to {config.max_position_embeddings}, the model's max_position_embeddings"
        )
    if batch < 1:
        raise UserError(f"--max_batch_size {batch}: give 1 or more")
    if max_num_tokens is not None and max_num_tokens < batch:
        raise UserError(f"--max_num_tokens {max_num_tokens}: a step holds a token of each of {batch} sequences")
    step = max(MAX_NUM_TOKENS, slots) if max_num_tokens is None else max_num_tokens
    name = config.dtype if dtype == "auto" else dtype.value
    load = Load(name, recipe_from_flags(quantization), batch=batch, slots=slots, step_tokens=step)
    codes = quantization.cache_dtype is not quant.KVCacheDType.auto
    return replace(load, cache_bytes=1 if codes else load.itemsize)


def describe(choice: Choice, load: Load, cluster: Cluster) -> dict[str, Any]:
    """The choice as JSON: bytes and seconds."""
    best = choice.best
    return {
        "gpus": asdict(cluster),
        "load": {
            "dtype": load.dtype,
            "cache_bytes": load.cache_bytes,
            "max_batch_size": load.batch,
            "max_seq_len": load.slots,
            "max_num_tokens": load.step_tokens,
        },
        "recommended": None if best is None else best.mapping.to_json(),
        "reasons": reasons(choice, cluster),
        "least_gpus": choice.least,
        "plans": [_as_json(each, load) for each in choice.plans],
        "refused": list(choice.refused),
    }


def _as_json(plan: Plan, load: Load) -> dict[str, Any]:
    step = plan.step
    return {
        "mapping": plan.mapping.to_json(),
        "fits": plan.fits,
        "fullest_rank": plan.rank,
        "memory": asdict(plan.memory) | {"weights": plan.memory.weights, "total": plan.memory.total},
        "decode_step": asdict(step)
        | {
            "floor_s": step.floor_s,
            "expected_s": step.expected_s,
            "expected_tokens_per_s": load.batch / step.expected_s,
        },
    }


def _print(choice: Choice, load: Load, cluster: Cluster) -> None:
    console = Console()
    gpu = cluster.gpu
    read = f"{gpu.bandwidth / 1e12:.2f} TB/s, {'measured' if gpu.measured else 'not measured'}"
    console.print(
        f"{cluster.gpus} × {gpu.name} of {gpu.memory / 1e9:.1f} GB ({read}), {cluster.gpus_per_node} a node;"
        f" {load.batch} sequences of {load.slots} tokens, steps of up to {load.step_tokens}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_table(choice))
    console.print(
        "GB of the fullest rank; ms of a decode step of all sequences with full caches: floor, and with work at the"
        f" {MEASURED_SHARE:.1%} of its floor that one H100 reached. docs/scaling.md says what is assumed.",
        highlight=False,
        soft_wrap=True,
    )
    best = choice.best
    if best is not None:
        console.print(f"recommended: {_options(best)}", highlight=False, soft_wrap=True)
    for line in reasons(choice, cluster):
        console.print(f"- {line}", highlight=False, soft_wrap=True, markup=False)


def _table(choice: Choice) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("mapping", "weights", "cache", "work", "GB", "floor", "expected", "fits"):
        table.add_column(name, justify="left" if name in ("mapping", "fits") else "right", no_wrap=True)
    for plan in choice.plans:
        memory, step = plan.memory, plan.step
        sizes = [f"{each / 1e9:.1f}" for each in (memory.weights, memory.cache, memory.workspace, memory.total)]
        times = [f"{1e3 * each:.2f}" for each in (step.floor_s, step.expected_s)]
        table.add_row(str(plan.mapping), *sizes, *times, "yes" if plan.fits else "no")
    return table


def _options(plan: Plan) -> str:
    """The mapping as options of ``compile``."""
    mapping = plan.mapping
    sizes = {
        "tp_size": mapping.tp_size,
        "moe_tp_size": mapping.moe_tp_size,
        "moe_ep_size": mapping.moe_ep_size,
        "pp_size": mapping.pp_size,
    }
    return " ".join(f"--{name} {size}" for name, size in sizes.items())
