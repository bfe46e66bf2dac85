"""What a plugin's node costs in a CUDA graph of an engine: ``python -m moecompiler.tools.bench_engine_overhead out.json``.

Engines of a chain of RMSNorm nodes on one token of 128 values, as long again as the other: the difference of their times, by the
nodes that it is for. Nothing is taken off: it is launch, wait for the node before, and what little the kernel has to do.
``alone``: the same kernels in a graph without an engine. TensorRT's own kernels for the op's body (``off``) are measured too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from moecompiler.plugins.rmsnorm.op import RMS_NORM
from moecompiler.plugins.tactics import tactics
from moecompiler.tools.kernel_machine import benchmark_parser, parse_for_gpu, write_rows
from moecompiler.tools.kernel_timing import compute_capability, microseconds, prepare, relative_error
from moecompiler.tools.one_node_program import chain, profile

HIDDEN, EPSILON = 128, 1e-5
LARGEST_ERROR = 5e-3
SIZES, ATTRIBUTES = {"hidden": HIDDEN}, {"epsilon": EPSILON}


@dataclass(frozen=True)
class Row:
    """Microseconds of both chains, and of a node; ``error`` of the longer chain's result."""

    kind: str
    dtype: str
    nodes: int
    shorter: float
    longer: float
    per_node: float
    error: float


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, weight (1 or -1, so that every node changes signs and no error grows) and output."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, HIDDEN, device="cuda").to(dtype)
    weight = torch.randn(HIDDEN, device="cuda").sign().to(dtype)
    return x, weight, torch.full_like(x, float("nan"))


def expected(x: torch.Tensor, weight: torch.Tensor, length: int) -> torch.Tensor:
    """The chain in float32."""
    y = x.float()
    for _ in range(length):
        y = weight.float() * (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + EPSILON))
    return y


def in_engine(dtype: str, plugins: str, length: int) -> tuple[float, float]:
    """Microseconds of a chain, and its result's error."""
    from moecompiler.tools.gpu_engine import TorchEngine
    from moecompiler.tools.one_node import build

    program = chain(RMS_NORM, ATTRIBUTES, SIZES, dtype, length)
    profiles = [profile(RMS_NORM, SIZES, ({"batch": 1, "sequence": 1},) * 3)]
    with tempfile.TemporaryDirectory() as folder:
        engine = TorchEngine(build(program, profiles, plugins, dtype, Path(folder)))
    x, weight, y = tensors(getattr(torch, dtype))
    work = partial(engine.run, 0, {"x": x, "weight": weight, "y": y})
    time, error = _timed(work, x, weight, y, length)
    engine.close()
    return time, error


def alone(dtype: str, length: int) -> tuple[float, float]:
    """The same of the kernels without an engine."""
    x, weight, y = tensors(getattr(torch, dtype))
    dims = tuple(x.shape), tuple(weight.shape)
    prepared = prepare(tactics("RMSNorm", ATTRIBUTES, dims, dtype, compute_capability())[0], dims)
    values = [x, *(torch.empty_like(x) for _ in range(length - 1)), y]

    def work() -> None:
        for given, made in pairwise(values):
            prepared([given, weight], [made])

    return _timed(work, x, weight, y, length)


def _timed(
    work: Callable[[], None], x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, length: int
) -> tuple[float, float]:
    work()
    error = relative_error(y, expected(x, weight, length))
    return microseconds([work] * 4), error


def measure(kind: str, dtype: str, nodes: int) -> Row:
    """One row; ``kind``: ``on`` or ``off`` in an engine, or ``alone``."""

    def run(length: int) -> tuple[float, float]:
        return alone(dtype, length) if kind == "alone" else in_engine(dtype, kind, length)

    (shorter, _), (longer, error) = run(nodes), run(2 * nodes)
    return Row(kind, dtype, nodes, shorter, longer, (longer - shorter) / nodes, error)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--nodes", type=int, default=40, help="of the shorter chain (%(default)s)")
    options = parse_for_gpu(parser, arguments)
    rows = []
    for dtype in options.dtypes:
        for kind in ("on", "alone", "off"):
            rows.append(row := measure(kind, dtype, options.nodes))
            print(
                f"{kind:5} {dtype:8} {row.nodes} nodes {row.shorter:7.1f} µs, {2 * row.nodes} nodes {row.longer:7.1f} µs:"
                f" {row.per_node:.2f} µs a node, error {row.error:.1e}",
                flush=True,
            )
            write_rows(options.output, rows)
    wrong = [row for row in rows if not row.error < LARGEST_ERROR * (8 if row.dtype == "bfloat16" else 1)]
    print(f"{rows[0].per_node:.2f} µs a plugin's node; {len(wrong)} of {len(rows)} results wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
