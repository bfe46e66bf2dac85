"""A MoE layer of codes inside TensorRT engines, as a plugin, beside one of floats.

    python -m moecompiler.tools.bench_engine_quantized_moe out.json [--layers 8x7b …] [--formats int8 …] [--tokens 1 16 …]

As ``bench_engine_moe`` measures the layer of floats: weights are inputs of the engine, codes as the bytes that the backend binds;
each number of tokens has an optimization profile of its own; a run is part of a CUDA graph. Rows and floors are those of
``bench_quantized_moe``, which measures the same kernels without an engine. Ends with status 1 where a result is wrong.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from moecompiler.config import NormalizationMode
from moecompiler.graph import Program
from moecompiler.ops import OpSpec
from moecompiler.plugins.launch import AnyKernel
from moecompiler.plugins.quantized.moe import quantized_moe_spec
from moecompiler.plugins.quantized.moe_node import moe_forms
from moecompiler.tools import bench_engine_moe, bench_moe
from moecompiler.tools.bench_quantized_moe import SIZES, Inputs, Row, found_tactics, table_line
from moecompiler.tools.kernel_machine import benchmark_parser, parse_for_gpu, write_rows
from moecompiler.tools.kernel_timing import (
    compile_ahead,
    compute_capability,
    matmul_peak,
    microseconds,
    read_bandwidth,
    relative_error,
)
from moecompiler.tools.one_node_program import dims_of, one_node, profile
from moecompiler.tools.quantized_layers import FORMATS, QuantizedLayer

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
KINDS = ("int8", "int4", "fp8", "nvfp4")
LARGEST_ERROR = 0.05  # rounding, and tokens that it routes otherwise


def spec_of(layer: QuantizedLayer) -> OpSpec:
    mode = NormalizationMode(layer.attributes["normalization_mode"])
    return quantized_moe_spec(mode, layer.attributes["top_k"], moe_forms()[layer.op])


def sizes_of(layer: QuantizedLayer) -> dict[str, int]:
    """The op's dims by name, all but the tokens."""
    values = zip(spec_of(layer).inputs, layer.dims(1), strict=True)
    sizes = {name: size for value, shape in values for name, size in zip(dims_of(value), shape, strict=True)}
    return {name: size for name, size in sizes.items() if name != "tokens"}


def program_of(layer: QuantizedLayer) -> Program:
    """The layer as a node, its weights inputs of the graph."""
    dtype = str(layer.dtype).removeprefix("torch.")
    return one_node(spec_of(layer), layer.attributes, sizes_of(layer), dtype)


def measure_layer(
    name: str, kind: str, layer: QuantizedLayer, tokens: Sequence[int], floats: Mapping[int, float], read: float
) -> list[Row]:
    """A row for each number of tokens; ``floats``: µs of the layer of floats; ``read`` in bytes per second."""
    from moecompiler.tools.gpu_engine import TorchEngine
    from moecompiler.tools.one_node import build

    spec, sizes, dtype = spec_of(layer), sizes_of(layer), str(layer.dtype).removeprefix("torch.")
    profiles = [profile(spec, sizes, ({"tokens": count},) * 3) for count in tokens]
    torch.cuda.empty_cache()  # TensorRT wants memory of its own
    with tempfile.TemporaryDirectory() as folder:
        engine = TorchEngine(build(program_of(layer), profiles, "on", dtype, Path(folder)))
    names, rows = [value.name for value in spec.inputs], []
    for index, count in enumerate(tokens):
        inputs = Inputs.random(count, layer.hidden, layer.dtype).rows
        output = torch.full_like(inputs[0], float("nan"))

        def run(x: torch.Tensor, index: int = index, output: torch.Tensor = output) -> None:
            engine.run(index, dict(zip(names, layer.inputs(x), strict=True)) | {"y": output})

        run(inputs[-1])
        error = relative_error(output, layer.expected(inputs[-1]))
        time = microseconds([partial(run, x) for x in inputs])
        hit = sum(map(layer.experts_hit, inputs)) / len(inputs)
        floor, other = 1e6 * hit * layer.expert_nbytes / read, floats.get(count, 0.0)
        shares = (time, floor, floor / time, other, other / time)
        block = layer.attributes.get("block_size", 0)
        rows.append(Row(name, kind, block, dtype, count, "engine", hit, *shares, error, read))
        print(table_line(rows[-1]), flush=True)
    engine.close()
    return rows


def kernels_of(layer: QuantizedLayer, tokens: Sequence[int]) -> list[AnyKernel]:
    """What TensorRT would ask for one after another."""
    plans = [(tactic, tactic.launches(layer.dims(count))) for tactic in found_tactics(layer) for count in tokens]
    return [tactic.kernels[launch.kernel] for tactic, launches in plans for launch in launches]


def floats_of(name: str, dtype: str, tokens: Sequence[int], read: float) -> dict[int, float]:
    """µs of the layer of floats in an engine, by number of tokens."""
    layer = bench_moe.Layer(name, *SIZES[name])
    tactics = bench_moe.find_tactics(layer, dtype)
    compile_ahead([k for tactic in tactics for k in tactic.kernels], compute_capability(), os.cpu_count() or 1)
    ceilings = bench_moe.Ceilings(read, matmul_peak(getattr(torch, dtype)))
    return {
        row.tokens: row.microseconds for row in bench_engine_moe.measure_layer(layer, dtype, "on", tokens, ceilings)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--layers", nargs="+", choices=SIZES, default=["8x7b"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(KINDS))
    parser.add_argument("--group_size", type=int, default=128, help="of int4")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--no_float", action="store_true", help="measure no layer of floats")
    options = parse_for_gpu(parser, arguments)
    rows: list[Row] = []
    read = read_bandwidth()
    print(f"reading {read / 1e12:.2f} TB/s", flush=True)
    for dtype in options.dtypes:
        for name in options.layers:
            floats = {} if options.no_float else floats_of(name, dtype, options.tokens, read)
            for kind in options.formats:
                block = options.group_size if kind.startswith("int4") else 16 if kind == "nvfp4" else 0
                layer = QuantizedLayer(FORMATS[kind], *SIZES[name], block=block, dtype=getattr(torch, dtype))
                compile_ahead(kernels_of(layer, options.tokens), compute_capability(), os.cpu_count() or 1)
                rows += measure_layer(name, kind, layer, options.tokens, floats, read)
                write_rows(options.output, rows)
                del layer
    wrong = [row for row in rows if not row.error < LARGEST_ERROR]
    print(f"{len(rows)} rows, {len(wrong)} of them wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
