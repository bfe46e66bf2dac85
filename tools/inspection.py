"""Verb ``inspect``: what is in an output directory."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moecompiler.artifact import Artifact
from moecompiler.pages.figures import byte_size
from moecompiler.quantization.as_json import recipe_from_json
from moecompiler.tools import options as opt
from moecompiler.tools.job import Job


def inspect(
    directory: Annotated[opt.Path, typer.Argument(help="What `export`, `optimize`, `build` or `compile` wrote.")],
    as_json: opt.Json = False,
) -> None:
    """Show ranks, sizes, inputs and outputs, ops, and where the weights are."""
    data = describe(Artifact.open(directory))
    if as_json:
        print(json.dumps(data, indent=2))
        return
    console = Console()
    _print_summary(console, data)
    for each in data["ranks"]:
        _print_rank(console, each)


def describe(artifact: Artifact) -> dict[str, Any]:
    """What the manifest and the graphs of an artifact say; no weight is read."""
    job = Job.of(artifact)
    return {
        "directory": str(artifact.directory),
        "stage": artifact.stage,
        "world_size": artifact.world_size,
        "mapping": job.mapping.to_json(),
        "model": job.model.to_json(),
        "export": job.export.to_json(),
        "weights_from": _weights_from(job),
        "checkpoint_format": job.source.get("quantization", {}).get("format"),
        "pipeline": artifact.header.get("pipeline"),
        "backend": artifact.header.get("backend"),
        "limits": artifact.header.get("limits"),
        "quantization": artifact.header.get("quantization"),
        "ranks": [_describe_rank(artifact, job, rank) for rank in artifact.ranks],
    }


def _weights_from(job: Job) -> str:
    if job.source["kind"] == "hf":
        return str(job.source["model_dir"])
    return f"dummy weights of seed {job.source['seed']}"


def _describe_rank(artifact: Artifact, job: Job, rank: int) -> dict[str, Any]:
    from moecompiler.graph import load_program

    graph = load_program(artifact.path(f"rank{rank}.onnx")).model.graph
    files = {name: record.bytes for name, record in artifact.rank_files(rank).items()}
    layers = job.mapping.layers(rank, job.model.num_hidden_layers)
    packed = [name for name in files if name.endswith(".safetensors")]
    return {
        "rank": rank,
        "layers": [layers.start, layers.stop - 1],
        "files": files,
        "weights": packed[0] if packed else f"by reference in {_weights_from(job)}",
        "inputs": [_signature(value) for value in graph.input],
        "outputs": [_signature(value) for value in graph.output],
        "ops": dict(Counter(_op(node) for node in graph.node).most_common()),
        "passes": artifact.rank_info(rank).get("passes", []),
        "quantized": artifact.rank_info(rank).get("quantized"),
        "engine": artifact.rank_info(rank).get("engine"),
    }


def _op(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _signature(value: Any) -> str:
    import onnx

    tensor = value.type.tensor_type
    dims = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{value.name}: {onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{dims}]"


def _print_summary(console: Console, data: dict[str, Any]) -> None:
    model = data["model"]
    table = Table(show_header=False, box=None)
    table.add_row("stage", data["stage"])
    table.add_row(
        "model",
        f"{model['num_hidden_layers']} layers, hidden {model['hidden_size']}, {model['num_local_experts']} experts"
        f" (top {model['num_experts_per_tok']}), vocabulary {model['vocab_size']}",
    )
    table.add_row("weights", data["weights_from"])
    if data["checkpoint_format"]:
        table.add_row("checkpoint", data["checkpoint_format"])
    table.add_row("dtype", data["export"]["dtype"])
    if data["quantization"] is not None:
        table.add_row("quantization", _rules(data["quantization"]))
    table.add_row("mapping", ", ".join(f"{name} {size}" for name, size in data["mapping"].items()))
    for key in ("pipeline", "backend"):
        if data[key]:
            table.add_row(key, data[key])
    if data["limits"]:
        table.add_row("limits", ", ".join(f"{name} {value}" for name, value in data["limits"].items()))
    console.print(table)


def _rules(data: dict[str, Any]) -> str:
    recipe = recipe_from_json(data)
    rules = "; ".join(f"{rule.match}: {rule.scheme or 'kept'}" for rule in recipe.rules)
    scales = f"; static scales of {len(recipe.input_scales)} inputs" if recipe.input_scales else ""
    cache = f"KV cache {recipe.cache}" if recipe.cache else ""
    return "; ".join(each for each in (rules + scales, cache) if each)


def _print_rank(console: Console, data: dict[str, Any]) -> None:
    first, last = data["layers"]
    console.print(f"\n[bold]rank {data['rank']}[/bold]: layers {first} to {last}, weights {data['weights']}")
    for name, size in data["files"].items():
        console.print(f"  {name}  {byte_size(size)}", highlight=False)
    if data["quantized"]:
        schemes = ", ".join(f"{count} weights {scheme}" for scheme, count in data["quantized"]["schemes"].items())
        kept = data["quantized"]["kept"]
        console.print(
            f"  quantized: {schemes or 'none'}{f'; kept all the same: {len(kept)}' if kept else ''}", highlight=False
        )
    if data["engine"]:
        _print_engine(console, data["engine"])
    caches = ("past_key_values.", "present.")
    bound = tuple(f"{name}:" for name in (data["engine"] or {}).get("bound", ()))
    for kind in ("inputs", "outputs"):
        data[kind] = [text for text in data[kind] if not text.startswith(bound)]
        shown = [text for text in data[kind] if not text.startswith(caches)]
        example = next((text for text in data[kind] if text.startswith(caches)), "no cache")
        count = len(data[kind]) - len(shown)
        console.print(f"  {kind}: {'; '.join(shown)}; {count} caches like {example}", highlight=False, markup=False)
    ops = ", ".join(f"{op} {count}" for op, count in data["ops"].items())
    console.print(f"  ops: {ops}", highlight=False)
    for step in data["passes"]:
        nodes = f"{step['nodes_before']} → {step['nodes_after']} nodes"
        console.print(f"  pass {step['name']}: {step['matches']} matches, {nodes}", highlight=False)


def _print_engine(console: Console, engine: dict[str, Any]) -> None:
    """What an engine's record says; see ``tensorrt_record.Record``, ``TensorRTRTXBackend.build`` and
    ``onnxruntime_interpreted.Interpreted``."""
    plugins = ", ".join(f"{op} {count}" for op, count in Counter(engine.get("plugins", {}).values()).most_common())
    if "interpreted_sm" in engine:
        tactics = ", ".join(sorted({f"{engine['plugins'][node]} {name}" for node, name in engine["tactics"].items()}))
        console.print(f"  plugins, interpreted: {plugins or 'none'}; tactics: {tactics}", highlight=False)
        return
    if "made" in engine:
        made = engine["made"]
        console.print(
            f"  runs on: SM {made['sm']} (built on {made['gpu']}), TensorRT {made['tensorrt']}", highlight=False
        )
    else:
        capabilities = ", ".join(engine["compute_capabilities"])
        console.print(f"  runs on: RTX cards of {capabilities}, TensorRT-RTX {engine['tensorrt_rtx']}", highlight=False)
    console.print(f"  plugins: {plugins or 'none'}; caches written in place: {len(engine['aliases'])}", highlight=False)
    shared = f"; shares {engine['shared']} with ranks of the same graph" if engine.get("shared") else ""
    console.print(f"  weights bound at run time: {len(engine['bound'])}{shared}", highlight=False)
