"""The kernels of quantized MoE ops beside those of float16, routing included:
``python -m moecompiler.tools.bench_quantized_moe --json out.json``.

A row's floor is reading codes, scales and zero points of the experts hit once, at the bandwidth that a kernel that only reads
reaches; many tokens are beside the float kernels' time instead. Both are measured in the same run, by kernels alone, without
TensorRT.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moecompiler.plugins.launch import AnyKernel, Dims, Tactic
from moecompiler.plugins.tactics import tactics
from moecompiler.tools import bench_moe
from moecompiler.tools.kernel_machine import DTYPES, parse_for_gpu, write_rows
from moecompiler.tools.kernel_timing import (
    compile_ahead,
    compute_capability,
    microseconds,
    prepare,
    read_bandwidth,
    relative_error,
)
from moecompiler.tools.quantized_layers import FORMATS, QuantizedLayer

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
SIZES = {"8x7b": (4096, 14336), "8x22b": (6144, 16384)}


@dataclass(frozen=True)
class Row:
    """``microseconds`` per run; ``hit`` experts on average; ``floor`` in µs and ``share`` of it reached; ``unquantized``: the
    fastest float tactic's µs, 0 if not measured, and ``speedup`` over it; ``read``: bytes per second."""

    layer: str
    format: str
    block: int
    dtype: str
    tokens: int
    tactic: str
    hit: float
    microseconds: float
    floor: float
    share: float
    unquantized: float
    speedup: float
    error: float
    read: float


@dataclass(frozen=True)
class Inputs:
    """Several inputs, run in turn, so that what one run has read is no longer cached for the next."""

    rows: list[torch.Tensor]

    @staticmethod
    def random(tokens: int, hidden: int, dtype: torch.dtype) -> Inputs:
        count = 16 if tokens < 256 else 4
        return Inputs([torch.randn(tokens, hidden, device="cuda").to(dtype) for _ in range(count)])


def different(found: Iterable[Tactic], dims: Dims) -> list[Tactic]:
    """The tactics that do not do what one before does."""
    plans: dict[tuple[object, ...], Tactic] = {}
    for tactic in found:
        launches = tactic.launches(dims)
        plans.setdefault(tuple((tactic.kernels[each.kernel], each.grid) for each in launches), tactic)
    return list(plans.values())


def floats(layer: str, dtype: torch.dtype, tokens: Sequence[int]) -> dict[int, float]:
    """The fastest float tactic's µs by number of tokens."""
    hidden, intermediate = SIZES[layer]
    weights = bench_moe.Weights(bench_moe.Layer(layer, hidden, intermediate), dtype)
    times = {}
    for count in tokens:
        inputs, dims = Inputs.random(count, hidden, dtype), weights.dims(count)
        attributes = {"top_k": bench_moe.TOP_K, "normalization_mode": 1}
        found = tactics("MoE", attributes, dims, str(dtype).removeprefix("torch."), compute_capability())
        output = torch.empty_like(inputs.rows[0])
        measured = []
        for tactic in different(found, dims):
            prepared = prepare(tactic, dims)
            measured.append(_timed(lambda x, run=prepared, y=output: run(weights.inputs(x), [y]), inputs))  # type: ignore[misc]
        times[count] = min(measured)
    return times


def measure(layer: QuantizedLayer, tactic: Tactic, inputs: Inputs) -> tuple[float, float]:
    """µs, and the relative error against float32 on the numbers that codes stand for."""
    first = inputs.rows[0]
    output = torch.full_like(first, float("nan"))
    prepared = prepare(tactic, layer.dims(len(first)))
    prepared(layer.inputs(first), [output])
    error = relative_error(output, layer.expected(first))
    return _timed(lambda x: prepared(layer.inputs(x), [output]), inputs), error


def _timed(work: Callable[[torch.Tensor], None], inputs: Inputs) -> float:
    return microseconds([partial(work, x) for x in inputs.rows])


def found_tactics(layer: QuantizedLayer) -> tuple[Tactic, ...]:
    """The layer's tactics for this device."""
    dtype = str(layer.dtype).removeprefix("torch.")
    return tactics(layer.op, layer.attributes, layer.dims(-1), dtype, compute_capability())


def run(options: argparse.Namespace) -> list[Row]:
    """Measures and prints every combination. A tactic that fails is told, and the others go on."""
    rows: list[Row] = []
    dtype, read = getattr(torch, options.dtype), read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, {options.dtype}: reading {read / 1e12:.2f} TB/s", flush=True)
    for name in options.layers:
        unquantized = {} if options.no_float else floats(name, dtype, options.tokens)
        for kind in options.formats:
            block = {"int4": options.group_size, "int4_asymmetric": options.group_size, "nvfp4": 16}.get(kind, 0)
            layer = QuantizedLayer(FORMATS[kind], *SIZES[name], block=block, dtype=dtype)
            found = [each for each in found_tactics(layer) if not options.tactics or each.name in options.tactics]
            kernels: list[AnyKernel] = [
                tactic.kernels[launch.kernel]
                for count in options.tokens
                for tactic in found
                for launch in tactic.launches(layer.dims(count))
            ]
            compile_ahead(kernels, compute_capability(), os.cpu_count() or 1)
            for count in options.tokens:
                inputs = Inputs.random(count, layer.hidden, dtype)
                hit = sum(map(layer.experts_hit, inputs.rows)) / len(inputs.rows)
                floor = 1e6 * hit * layer.expert_nbytes / read
                for tactic in different(found, layer.dims(count)):
                    time, error = measure(layer, tactic, inputs)
                    other = unquantized.get(count, 0.0)
                    shares = (time, floor, floor / time, other, other / time)
                    rows.append(Row(name, kind, block, options.dtype, count, tactic.name, hit, *shares, error, read))
                    print(table_line(rows[-1]), flush=True)
            del layer
    return rows


def table_line(row: Row) -> str:
    return (
        f"{row.layer:6} {row.format:15} {row.tactic:10} {row.tokens:5} tokens {row.hit:4.1f} experts {row.microseconds:8.1f} µs"
        f"  floor {row.floor:7.1f} {100 * row.share:5.1f}%"
        f"  float {row.unquantized:8.1f} µs {row.speedup:5.2f}x  error {row.error:.1e}"
    )


def slower_than_float(rows: Sequence[Row]) -> list[str]:
    """A line for each format and number of tokens at which no tactic is as fast as the float kernels."""
    best: dict[tuple[str, str, int], float] = {}
    for row in rows:
        key = row.layer, row.format, row.tokens
        best[key] = max(best.get(key, 0.0), row.speedup)
    return [
        f"{layer} {kind}: slower than floats at {tokens} tokens ({speedup:.2f}x)"
        for (layer, kind, tokens), speedup in best.items()
        if 0 < speedup < 1
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for all rows")
    parser.add_argument("--layers", nargs="+", choices=SIZES, default=["8x7b"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--group_size", type=int, default=128, help="of int4")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--tactics", nargs="+", help="only those of these names")
    parser.add_argument("--no_float", action="store_true", help="measure no float kernels")
    options = parse_for_gpu(parser, arguments)
    rows = run(options)
    print("\n".join(slower_than_float(rows)))
    if options.json:
        write_rows(options.json, rows)


if __name__ == "__main__":
    main()
