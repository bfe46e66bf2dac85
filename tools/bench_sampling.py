"""Times the choice of tokens on the GPU: float16 logits to tokens, all kernels of a step in a CUDA graph, microseconds.

    python -m moecompiler.tools.bench_sampling OUTPUT.json [--dtypes float16 bfloat16]

``floor``: reading the logits once at the bandwidth of a large read measured in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from moecompiler.plugins.sampling.launch import SamplingTactic
from moecompiler.runtime.sampling import Sampler, SamplingOptions, device_options
from moecompiler.tools.kernel_machine import benchmark_parser, parse_for_gpu, write_rows
from moecompiler.tools.kernel_timing import microseconds, prepare, read_bandwidth

ROWS, VOCABULARIES, SLOTS = (1, 8, 64), (32000, 128256), 512
WAYS = {
    "greedy": SamplingOptions(),
    "temperature": SamplingOptions(temperature=0.8),
    "top_k 50": SamplingOptions(top_k=50),
    "top_p 0.9": SamplingOptions(top_p=0.9),
    "top_k 50, top_p 0.9": SamplingOptions(temperature=0.8, top_k=50, top_p=0.9),
}


@dataclass(frozen=True)
class Row:
    """Times in microseconds."""

    way: str
    rows: int
    vocab: int
    dtype: str
    microseconds: float
    floor: float


def measure(way: str, rows: int, vocab: int, dtype: str, read: float) -> Row:
    """Random logits as a model's spread; every run draws the next number."""
    options = WAYS[way]
    logits = (3 * torch.randn(rows, vocab, device="cuda")).to(getattr(torch, dtype))
    uniforms = torch.from_numpy(Sampler(options, rows).uniforms(SLOTS)).cuda()
    state = [torch.zeros(rows, dtype=torch.int64, device="cuda") for _ in range(4)]
    seen = torch.zeros(rows, vocab, dtype=torch.uint8, device="cuda")
    inputs = [logits, torch.from_numpy(device_options(options)).cuda(), uniforms, *state[:2], seen]
    tactic = SamplingTactic("greedy" if options.greedy else "drawn", vocab, dtype)
    prepared = prepare(tactic, tuple(tuple(value.shape) for value in inputs))
    time = microseconds([lambda: prepared(inputs, state[2:])] * 20)
    return Row(way, rows, vocab, dtype, time, 1e6 * logits.nbytes / read)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_for_gpu(benchmark_parser(__doc__), arguments)
    rows, read = [], read_bandwidth()
    for dtype, vocab, count, way in product(options.dtypes, VOCABULARIES, ROWS, WAYS):
        rows.append(measure(way, count, vocab, dtype, read))
        print(f"{dtype} {count:3} × {vocab:6}  {way:20} {rows[-1].microseconds:7.1f} µs", flush=True)
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
