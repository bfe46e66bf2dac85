"""Products with quantized weights beside torch's float16 ones: ``python -m moecompiler.tools.bench_quantized_linear``.

A row's floor is the larger of two times: reading codes and scales once, at the bandwidth that a kernel that only reads reaches;
and the arithmetic, at torch's rate for large float16 matrices, for FP8 twice that. ``float16`` is what torch takes for the same
product of a float weight, ``times`` how many times as fast the row is.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moecompiler.plugins.launch import AnyKernel, Dims, Tactic
from moecompiler.plugins.quantized.linear_launch import tactics
from moecompiler.tools.kernel_machine import DTYPES, parse_for_gpu, write_rows
from moecompiler.tools.kernel_timing import (
    compile_ahead,
    compute_capability,
    matmul_peak,
    microseconds,
    prepare,
    read_bandwidth,
    relative_error,
)
from moecompiler.tools.random_codes import FORMATS, Format, RandomWeight

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
CACHED = 128 << 20
"""Bytes that are read between two uses of a weight, so that none is found in a cache."""


@dataclass(frozen=True)
class Layer:
    name: str
    out: int
    columns: int


LAYERS = (
    Layer("qkv", 6144, 4096),
    Layer("o_proj", 4096, 4096),
    Layer("qkv tp2", 3072, 4096),
    Layer("o_proj tp2", 4096, 2048),
    Layer("lm_head", 32000, 4096),
)


@dataclass(frozen=True)
class Row:
    """Times in µs; ``share`` of the floor that is reached; ``error`` is relative, against float32."""

    layer: str
    format: str
    dtype: str
    tokens: int
    tactic: str
    microseconds: float
    floor: float
    bound: str
    share: float
    float16: float
    times: float
    error: float


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations per second."""

    read: float
    matmul: float


def copies_of(size: int) -> int:
    """How many weights of ``size`` bytes are used in turn."""
    return max(2, min(32, -(-CACHED // size)))


class FloatProduct:
    """torch's product with float weights of a layer."""

    def __init__(self, layer: Layer, dtype: torch.dtype):
        count = copies_of(2 * layer.out * layer.columns)
        shape = (count, layer.out, layer.columns)
        self.weights = torch.randn(shape, dtype=dtype, device="cuda").mul_(layer.columns**-0.5)

    def time(self, tokens: int) -> float:
        x = torch.randn(tokens, self.weights.shape[2], device="cuda").to(self.weights.dtype)
        y = torch.empty(tokens, self.weights.shape[1], dtype=x.dtype, device="cuda")

        def multiply(weight: torch.Tensor) -> None:
            torch.mm(x, weight.T, out=y)

        return microseconds([partial(multiply, weight) for weight in self.weights], 0.05)


class Weights:
    """Copies of a quantized weight on the device."""

    def __init__(self, layer: Layer, form: Format, dtype: torch.dtype):
        self.first = RandomWeight(form, layer.out, layer.columns, dtype, "cuda")
        others = range(1, copies_of(self.first.size))
        self.all = [self.first, *(RandomWeight(form, layer.out, layer.columns, dtype, "cuda", i) for i in others)]

    def measure(self, tactic: Tactic, tokens: int) -> tuple[float, float]:
        """The time in µs, and the relative error."""
        x = torch.randn(tokens, self.first.columns, device="cuda").to(self.first.dtype)
        y = torch.full((tokens, self.first.out), float("nan"), dtype=x.dtype, device="cuda")
        prepared = prepare(tactic, self.first.dims(tokens))
        prepared([x, *self.first.inputs], [y])
        error = relative_error(y, self.first.product(x))
        return microseconds([partial(prepared, [x, *weight.inputs], [y]) for weight in self.all], 0.05), error


def find_tactics(layer: Layer, form: Format, dtype: str) -> tuple[Tactic, ...]:
    """The weight's tactics for this device."""
    columns = layer.columns // 2 if "Nvfp4" in form.op else layer.columns
    dims = ((-1, layer.columns), (layer.out, columns))
    return tactics(form.op, form.attributes, dims, dtype, compute_capability())


def _different(found: Iterable[Tactic], dims: Dims) -> list[Tactic]:
    """The tactics that do not do what one before does."""
    plans: dict[object, Tactic] = {}
    for tactic in found:
        launches = tactic.launches(dims)
        plans.setdefault(tuple((tactic.kernels[each.kernel], each.grid) for each in launches), tactic)
    return list(plans.values())


def run(layers: Sequence[Layer], formats: Sequence[Format], dtype: str, tokens: Sequence[int]) -> list[Row]:
    """Measures and prints every combination."""
    kernels: dict[AnyKernel, None] = {}
    for layer in layers:
        for form in formats:
            for tactic in find_tactics(layer, form, dtype):
                for count in tokens:
                    dims = ((count, layer.columns),)
                    kernels |= dict.fromkeys(tactic.kernels[each.kernel] for each in tactic.launches(dims))
    compile_ahead(kernels, compute_capability(), os.cpu_count() or 1)
    kind = getattr(torch, dtype)
    ceilings = Ceilings(read_bandwidth(), matmul_peak(kind))
    print(f"{dtype}: reading {ceilings.read / 1e12:.2f} TB/s, matrix product {ceilings.matmul / 1e12:.0f} TFLOP/s")
    rows: list[Row] = []
    for layer in layers:
        product = FloatProduct(layer, kind)
        floats = {count: product.time(count) for count in tokens}
        del product
        for form in formats:
            weights = Weights(layer, form, kind)
            for count in tokens:
                for tactic in _different(find_tactics(layer, form, dtype), weights.first.dims(count)):
                    rows.append(_row(layer, form, dtype, weights, tactic, count, floats[count], ceilings))
                    print(table_line(rows[-1]), flush=True)
    return rows


def _row(
    layer: Layer,
    form: Format,
    dtype: str,
    weights: Weights,
    tactic: Tactic,
    tokens: int,
    float16: float,
    ceilings: Ceilings,
) -> Row:
    time, error = weights.measure(tactic, tokens)
    operations = 2 * tokens * layer.out * layer.columns / (2 if "Fp8" in form.op else 1)
    floors = {"bytes": 1e6 * weights.first.size / ceilings.read, "matmul": 1e6 * operations / ceilings.matmul}
    bound = max(floors, key=lambda name: floors[name])
    floor = floors[bound]
    ratios = (floor / time, float16, float16 / time)
    return Row(layer.name, str(form), dtype, tokens, tactic.name, time, floor, bound, *ratios, error)


def table_line(row: Row) -> str:
    return (
        f"{row.layer:10} {row.format:19} {row.tokens:5} tokens {row.microseconds:8.1f} µs  floor {row.floor:7.1f} ({row.bound:6})"
        f" {100 * row.share:5.1f}%  float {row.float16:7.1f} = {row.times:5.2f} times  error {row.error:.1e}  {row.tactic}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names, formats = [layer.name for layer in LAYERS], [str(form) for form in FORMATS]
    parser.add_argument("--layers", nargs="+", choices=names, default=names)
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--json", type=Path, help="where all rows go")
    options = parse_for_gpu(parser, arguments)
    layers = [layer for layer in LAYERS if layer.name in options.layers]
    rows = run(layers, [form for form in FORMATS if str(form) in options.formats], options.dtype, options.tokens)
    if options.json:
        write_rows(options.json, rows)


if __name__ == "__main__":
    main()
