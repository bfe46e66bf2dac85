"""A MoE layer inside TensorRT engines, routing and combination included.

    python -m moecompiler.tools.bench_engine_moe out.json [--layers 8x7b …] [--plugins on off] [--tokens 1 16 …]

As a plugin (``--plugins on``) or as the op's body, TensorRT's own kernels (``off``). Weights are inputs of the engine, random,
and made on the GPU; each number of tokens has an optimization profile of its own; a run is part of a CUDA graph. A row and its
floor are as in ``bench_moe``, which measures the same kernels without an engine. Ends with status 1 where a result is wrong.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moecompiler.config import NormalizationMode
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.tools.bench_moe import (
    EXPERTS,
    LAYERS,
    TOP_K,
    Ceilings,
    Layer,
    Row,
    Weights,
    find_tactics,
    random_tokens,
    row_of,
    table_line,
)
from moecompiler.tools.kernel_machine import benchmark_parser, parse_for_gpu, write_rows
from moecompiler.tools.kernel_timing import (
    compile_ahead,
    compute_capability,
    matmul_peak,
    microseconds,
    read_bandwidth,
    relative_error,
)
from moecompiler.tools.one_node_program import one_node, profile

if TYPE_CHECKING:
    from moecompiler.tools.gpu_engine import TorchEngine

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 8192)
LARGEST_ERROR = 0.05  # rounding, and tokens that it routes otherwise
SPEC, ATTRIBUTES = moe_spec(NormalizationMode.RENORMALIZE, TOP_K), {"top_k": TOP_K, "normalization_mode": 1}


def sizes_of(layer: Layer) -> dict[str, int]:
    """The op's dims by name, all but the tokens."""
    return {
        "hidden": layer.hidden,
        "intermediate": layer.intermediate,
        "twice_intermediate": 2 * layer.intermediate,
        "experts": EXPERTS,
        "local_experts": layer.local,
    }


def measure_layer(layer: Layer, dtype: str, plugins: str, tokens: Sequence[int], ceilings: Ceilings) -> list[Row]:
    """A row for each number of tokens."""
    from moecompiler.tools.gpu_engine import TorchEngine
    from moecompiler.tools.one_node import build

    sizes = sizes_of(layer)
    program = one_node(SPEC, ATTRIBUTES, sizes, dtype)
    profiles = [profile(SPEC, sizes, ({"tokens": count},) * 3) for count in tokens]
    torch.cuda.empty_cache()  # TensorRT wants memory of its own
    with tempfile.TemporaryDirectory() as folder:
        engine = TorchEngine(build(program, profiles, plugins, dtype, Path(folder)))
    weights, rows = Weights(layer, getattr(torch, dtype)), []
    for index, count in enumerate(tokens):
        rows.append(_measure(engine, index, weights, count, plugins, ceilings))
        print(table_line(rows[-1]), flush=True)
    engine.close()
    return rows


def _measure(engine: TorchEngine, index: int, weights: Weights, tokens: int, plugins: str, ceilings: Ceilings) -> Row:
    inputs = random_tokens(weights, tokens)
    output = torch.full_like(inputs[0], float("nan"))
    names = [value.name for value in SPEC.inputs]

    def run(x: torch.Tensor) -> None:
        engine.run(index, dict(zip(names, weights.inputs(x), strict=True)) | {"y": output})

    run(inputs[-1])
    error = relative_error(output, weights.expected(inputs[-1]))
    time = microseconds([partial(run, x) for x in inputs])
    return row_of(weights, f"engine, {plugins}", inputs, time, error, ceilings)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    names = [layer.name for layer in LAYERS]
    parser.add_argument("--layers", nargs="+", choices=names, default=names)
    parser.add_argument("--plugins", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    options = parse_for_gpu(parser, arguments)
    layers = [layer for layer in LAYERS if layer.name in options.layers]
    if "on" in options.plugins:  # many at once, where TensorRT would ask for one after another
        tactics = [tactic for layer in layers for dtype in options.dtypes for tactic in find_tactics(layer, dtype)]
        kernels = [kernel for tactic in tactics for kernel in tactic.kernels]
        compile_ahead(kernels, compute_capability(), os.cpu_count() or 1)
    rows: list[Row] = []
    read = read_bandwidth()
    for dtype in options.dtypes:
        ceilings = Ceilings(read, matmul_peak(getattr(torch, dtype)))
        print(
            f"{dtype}: reading {read / 1e12:.2f} TB/s, matrix product {ceilings.matmul / 1e12:.0f} TFLOP/s", flush=True
        )
        for layer in layers:
            for plugins in options.plugins:
                rows += measure_layer(layer, dtype, plugins, options.tokens, ceilings)
                write_rows(options.output, rows)
    wrong = [row for row in rows if not row.error < LARGEST_ERROR]
    print(f"{len(rows)} rows, {len(wrong)} of them wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
