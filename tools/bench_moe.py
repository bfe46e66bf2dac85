"""The MoE kernels on layers of Mixtral, routing and combination included: ``python -m moecompiler.tools.bench_moe out.json``.

A row's floor is the larger of two times: reading the weights of all experts hit once, at the bandwidth that a kernel that only
reads reaches; and the products' arithmetic, at torch's rate for large matrices. Both are measured in the same run, torch's rate
right after each row that it may bound, since a card that has been at work clocks lower.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from moecompiler.plugins.launch import AnyKernel, Dims
from moecompiler.plugins.moe.launch import MoETactic
from moecompiler.plugins.tactics import tactics
from moecompiler.tools.kernel_machine import benchmark_parser, parse_for_gpu, write_rows
from moecompiler.tools.kernel_timing import (
    compile_ahead,
    compute_capability,
    matmul_peak,
    microseconds,
    prepare,
    read_bandwidth,
    relative_error,
)

TOP_K = 2
EXPERTS = 8
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Layer:
    """A rank's share of a layer."""

    name: str
    hidden: int
    intermediate: int
    local: int = EXPERTS


LAYERS = (
    Layer("8x7b", 4096, 14336),
    Layer("8x7b tp2", 4096, 7168),
    Layer("8x7b tp4", 4096, 3584),
    Layer("8x7b ep2", 4096, 14336, 4),
    Layer("8x7b ep4", 4096, 14336, 2),
    Layer("8x22b", 6144, 16384),
)


@dataclass(frozen=True)
class Row:
    """``microseconds`` per run; ``hit`` experts on average; ``floor`` in µs, ``share`` of it that is reached; ``read`` and
    ``matmul``: the ceilings in bytes and operations per second."""

    layer: str
    tokens: int
    dtype: str
    tactic: str
    hit: float
    microseconds: float
    floor: float
    bound: str
    share: float
    tflops: float
    error: float
    read: float
    matmul: float


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations per second."""

    read: float
    matmul: float


class Weights:
    """A layer's weights on the device, random, of the scale that keeps activations near 1."""

    def __init__(self, layer: Layer, dtype: torch.dtype):
        torch.manual_seed(0)
        hidden, intermediate, local = layer.hidden, layer.intermediate, layer.local

        def random(*shape: int, columns: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=dtype, device="cuda").mul_(columns**-0.5)

        self.layer, self.dtype = layer, dtype
        self.router = random(EXPERTS, hidden, columns=hidden)
        self.gate_up = random(local, 2 * intermediate, hidden, columns=hidden)
        self.down = random(local, hidden, intermediate, columns=intermediate)
        self.expert_ids = torch.arange(local, device="cuda")

    def inputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, self.router, self.gate_up, self.down, self.expert_ids]

    def dims(self, tokens: int) -> Dims:
        return (
            (tokens, self.layer.hidden),
            *(tuple(tensor.shape) for tensor in (self.router, self.gate_up, self.down, self.expert_ids)),
        )

    def routed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token's weights, float32, and experts: ``[tokens, TOP_K]``."""
        logits, experts = torch.topk((x @ self.router.T).float(), TOP_K)
        return torch.softmax(logits, -1), experts

    def local_experts_hit(self, x: torch.Tensor) -> int:
        experts = self.routed(x)[1].unique()
        return int((experts < self.layer.local).sum())

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """The layer in float32, on the same rounded weights."""
        weights, experts = self.routed(x)
        total = torch.zeros(x.shape, device="cuda")
        for expert in range(self.layer.local):
            token, k = (experts == expert).nonzero(as_tuple=True)
            gate, up = (x[token].float() @ self.gate_up[expert].float().T).chunk(2, -1)
            result = (torch.nn.functional.silu(gate) * up) @ self.down[expert].float().T
            total.index_add_(0, token, result * weights[token, k, None])
        return total


def random_tokens(weights: Weights, tokens: int) -> list[torch.Tensor]:
    """Several inputs, to be run in turn, so that what one run has read is no longer cached for the next."""
    count, hidden = 16 if tokens < 256 else 4, weights.layer.hidden
    return [torch.randn(tokens, hidden, device="cuda").to(weights.dtype) for _ in range(count)]


def measure(weights: Weights, tactic: MoETactic, tokens: int, ceilings: Ceilings) -> Row:
    """One row, of kernels by themselves."""
    inputs = random_tokens(weights, tokens)
    output = torch.full_like(inputs[0], float("nan"))
    prepared = prepare(tactic, weights.dims(tokens))
    prepared(weights.inputs(inputs[-1]), [output])
    error = relative_error(output, weights.expected(inputs[-1]))
    time = microseconds([lambda x=x: prepared(weights.inputs(x), [output]) for x in inputs])  # type: ignore[misc]
    return row_of(weights, tactic.name, inputs, time, error, ceilings)


def row_of(
    weights: Weights, tactic: str, inputs: Sequence[torch.Tensor], time: float, error: float, ceilings: Ceilings
) -> Row:
    """The row of a measured ``time``, in µs; the matrix product's ceiling is measured anew where it may bound."""
    layer, tokens = weights.layer, len(inputs[0])
    if tokens >= 512:
        ceilings = replace(ceilings, matmul=matmul_peak(weights.dtype))
    hit = sum(map(weights.local_experts_hit, inputs)) / len(inputs)
    assigned = sum(int((weights.routed(x)[1] < layer.local).sum()) for x in inputs) / len(inputs)
    operations = 2 * 3 * assigned * layer.hidden * layer.intermediate
    size = 2 * 3 * hit * layer.hidden * layer.intermediate
    floors = {"bytes": 1e6 * size / ceilings.read, "matmul": 1e6 * operations / ceilings.matmul}
    bound = max(floors, key=lambda name: floors[name])
    floor = floors[bound]
    dtype = str(weights.dtype).removeprefix("torch.")
    shares = (floor / time, operations / time / 1e6)
    limits = (ceilings.read, ceilings.matmul)
    return Row(layer.name, tokens, dtype, tactic, hit, time, floor, bound, *shares, error, *limits)


def find_tactics(layer: Layer, dtype: str) -> tuple[MoETactic, ...]:
    """The layer's tactics for this device."""
    router, gate_up = (EXPERTS, layer.hidden), (layer.local, 2 * layer.intermediate, layer.hidden)
    dims = ((-1, layer.hidden), router, gate_up, (layer.local, layer.hidden, layer.intermediate), (layer.local,))
    attributes = {"top_k": TOP_K, "normalization_mode": 1}
    found = tactics("MoE", attributes, dims, dtype, compute_capability())
    return tuple(tactic for tactic in found if isinstance(tactic, MoETactic))


def _different(found: Iterable[MoETactic], dims: Dims) -> list[MoETactic]:
    """The tactics that do not do what one before does."""
    plans: dict[tuple[AnyKernel, ...], MoETactic] = {}
    for tactic in found:
        plans.setdefault(tuple(tactic.kernels[launch.kernel] for launch in tactic.launches(dims)), tactic)
    return list(plans.values())


def run(layers: Iterable[Layer], dtypes: Iterable[str], tokens: Iterable[int]) -> list[Row]:
    """Measures and prints every combination."""
    rows: list[Row] = []
    tokens, layers, dtypes = tuple(tokens), tuple(layers), tuple(dtypes)
    kernels = (
        k for layer in layers for dtype in dtypes for tactic in find_tactics(layer, dtype) for k in tactic.kernels
    )
    compile_ahead(kernels, compute_capability(), os.cpu_count() or 1)
    read = read_bandwidth()
    for dtype in dtypes:
        ceilings = Ceilings(read, matmul_peak(getattr(torch, dtype)))
        print(
            f"{dtype}: reading {read / 1e12:.2f} TB/s, matrix product {ceilings.matmul / 1e12:.0f} TFLOP/s", flush=True
        )
        for layer in layers:
            weights = Weights(layer, getattr(torch, dtype))
            for count in tokens:
                for tactic in _different(find_tactics(layer, dtype), weights.dims(count)):
                    rows.append(measure(weights, tactic, count, ceilings))
                    print(table_line(rows[-1]), flush=True)
            del weights
    return rows


def table_line(row: Row) -> str:
    return (
        f"{row.layer:9} {row.dtype:8} {row.tactic:16} {row.tokens:5} tokens {row.hit:4.1f} experts {row.microseconds:8.1f} µs"
        f"  floor {row.floor:8.1f} ({row.bound:6})  {100 * row.share:5.1f}%  {row.tflops:6.1f} TFLOP/s  error {row.error:.1e}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    names = [layer.name for layer in LAYERS]
    parser.add_argument("--layers", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    options = parse_for_gpu(parser, arguments)
    rows = run([layer for layer in LAYERS if layer.name in options.layers], options.dtypes, options.tokens)
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
