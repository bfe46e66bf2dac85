"""The attention kernels, rotary embedding and cache update included: ``python -m moecompiler.tools.bench_attention out.json``.

Decode's floor is reading the visible keys and values once, at the bandwidth that a kernel that only reads reaches. Prefill's
is the arithmetic of the two products below the diagonal, at torch's rate for large matrices. Both are measured in the same run,
torch's rate right after each row, since a card that has been at work clocks lower.

``--caches floats int8 fp8 fp8_context`` measures caches of codes too; ``fp8_context`` also multiplies FP8 in prefill, whose
floor stays that of the model's type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from moecompiler.plugins.launch import Dims
from moecompiler.plugins.tactics import tactics
from moecompiler.tools.kernel_machine import benchmark_parser, parse_for_gpu, write_rows
from moecompiler.tools.kernel_timing import (
    Prepared,
    compute_capability,
    matmul_peak,
    microseconds,
    prepare,
    read_bandwidth,
    relative_error,
)

FLOATS = "floats"
OPS = {
    FLOATS: "Attention",
    "int8": "AttentionInt8Cache",
    "fp8": "AttentionFp8Cache",
    "fp8_context": "AttentionFp8Context",
}


@dataclass(frozen=True)
class Case:
    """``new`` tokens in each of ``batch`` sequences behind ``past`` ones; the cache has ``slots`` and holds what ``OPS`` says."""

    batch: int
    new: int
    past: int
    slots: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    cache: str = FLOATS

    @property
    def op(self) -> str:
        return OPS[self.cache]

    @property
    def cache_bytes(self) -> int:
        """Of a number in the cache."""
        return 2 if self.cache == FLOATS else 1

    @property
    def attributes(self) -> dict[str, int | float]:
        scale = self.head_dim**-0.5
        return {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "scale": scale, "window": 0}

    @property
    def dims(self) -> Dims:
        cache = (self.batch, self.kv_heads, self.slots, self.head_dim)
        angles = (self.batch, 1, self.new, self.head_dim)
        rows = [(self.batch, self.new, n * self.head_dim) for n in (self.heads, self.kv_heads, self.kv_heads)]
        scales = () if self.cache == FLOATS else ((1,), (1,))
        return (*rows, angles, angles, (self.batch, self.new), cache, cache, *scales)


CASES = (
    Case(1, 1, 127, 128),
    Case(1, 1, 4095, 4096),
    Case(4, 1, 2047, 2048),
    Case(32, 1, 4095, 4096),
    Case(64, 1, 1023, 4096),
    Case(1, 128, 0, 4096),
    Case(1, 4096, 0, 4096),
    Case(4, 4096, 0, 4096),
    Case(1, 16384, 0, 16384),
    Case(1, 1024, 3072, 4096),
)


@dataclass(frozen=True)
class Row:
    """``microseconds`` per run, of which ``floor`` have to be; ``share`` of it that is reached; ``error``: relative, the peer
    has none; ``read`` and ``matmul``: the ceilings in bytes and operations per second."""

    case: str
    dtype: str
    tactic: str
    microseconds: float
    floor: float
    share: float
    tflops: float
    error: float | None
    read: float
    matmul: float


Tensors = list[torch.Tensor]


def random_inputs(case: Case, dtype: torch.dtype) -> Tensors:
    """The op's inputs, in order, with random numbers."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device="cuda")

    rows, cache = case.dims[:3], case.dims[6]
    positions = (case.past + torch.arange(case.new, device="cuda")).repeat(case.batch, 1)
    steps = torch.arange(case.head_dim // 2, device="cuda").repeat(2) / (case.head_dim // 2)
    angles = positions[:, None, :, None].float() * 1e6**-steps
    new = [random(*shape) for shape in rows]
    inputs = [*new, angles.cos().to(dtype), angles.sin().to(dtype), positions]
    if case.cache == FLOATS:
        return [*inputs, random(*cache), random(*cache)]
    scales = [
        torch.tensor([scale], dtype=dtype, device="cuda")
        for scale in ((0.04, 0.03) if case.cache == "int8" else (0.01, 0.01))
    ]
    return [*inputs, *(to_codes(random(*cache), scale, case.cache).view(torch.int8) for scale in scales), *scales]


def to_codes(x: torch.Tensor, scale: torch.Tensor, cache: str) -> torch.Tensor:
    """int8, or torch's own E4M3."""
    steps = x.float() / scale.float()
    if cache == "int8":
        return steps.round().clamp(-127, 127).to(torch.int8)
    return steps.clamp(-448, 448).to(torch.float8_e4m3fn)


def cached(
    past: torch.Tensor, new: torch.Tensor, at: torch.Tensor, scale: torch.Tensor | None, cache: str
) -> torch.Tensor:
    """A sequence's keys or values as numbers, ``new`` among them, float32."""
    if scale is None:
        numbers, written = past.float(), new.float()
    else:
        written = to_codes(new, scale, cache).float() * scale.float()
        numbers = (past if cache == "int8" else past.view(torch.float8_e4m3fn)).float() * scale.float()
    numbers = numbers.clone()
    numbers[:, at] = written
    return numbers


def expected(case: Case, inputs: Tensors) -> torch.Tensor:
    """The output in float32, on one sequence at a time; the inputs' caches are not written."""
    query, key, value, cos, sin, positions, past_key, past_value, *scales = inputs
    key_scale, value_scale = scales or (None, None)
    rounds = case.cache == "fp8_context" and case.new > 1
    results = []
    for b in range(case.batch):
        heads = [x[b].view(case.new, -1, case.head_dim).transpose(0, 1) for x in (query, key, value)]
        rotated = [_rotate(x.float(), cos[b].float(), sin[b].float()).to(x.dtype) for x in heads[:2]]
        keys = cached(past_key[b], rotated[1], positions[b], key_scale, case.cache)
        values = cached(past_value[b], heads[2], positions[b], value_scale, case.cache)
        queries = rotated[0].to(torch.float8_e4m3fn).float() if rounds else rotated[0].float()
        end = case.past + case.new
        mask = torch.arange(end, device="cuda") <= positions[b][:, None]
        group = case.heads // case.kv_heads
        rows = []
        for head in range(case.heads):
            k, v = keys[head // group, :end], values[head // group, :end]
            scores = (queries[head] @ k.T * case.head_dim**-0.5).masked_fill(~mask, float("-inf"))
            rows.append(_shares(scores, rounds) @ v)
        results.append(torch.stack(rows, 1).reshape(case.new, -1))
    return torch.stack(results)


def _shares(scores: torch.Tensor, rounds: bool) -> torch.Tensor:
    """The softmax, its numerators rounded as ``cache_op`` says."""
    if not rounds:
        return torch.softmax(scores, -1)
    scores = scores * math.log2(math.e)
    powers = torch.exp2(scores - scores.amax(-1, keepdim=True).ceil())
    return (256 * powers).to(torch.float8_e4m3fn).float() / 256 / powers.sum(-1, keepdim=True)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def runner(prepared: Prepared, inputs: Tensors, output: torch.Tensor) -> Callable[[], None]:
    """Runs a plan, the cache updated in place."""
    return lambda: prepared(inputs, [output, inputs[6], inputs[7]])


def copies(case: Case) -> int:
    """How many caches to go round, so that each is out of the GPU's own cache when its turn comes."""
    size = 2 * case.cache_bytes * case.batch * case.kv_heads * case.slots * case.head_dim
    return max(2, min(40, -(-400_000_000 // size)))


def measure(case: Case, dtype: torch.dtype, read: float) -> Iterator[Row]:
    """A row per tactic, of kernels by themselves, with another cache in each run of a graph."""
    name = str(dtype).removeprefix("torch.")
    sets = [random_inputs(case, dtype) for _ in range(copies(case))]
    output = torch.empty_like(sets[0][0])
    want = expected(case, sets[0])
    for tactic in tactics(case.op, case.attributes, case.dims, name, compute_capability()):
        prepared = prepare(tactic, case.dims)
        runner(prepared, sets[0], output.fill_(float("nan")))()
        error = relative_error(output, want)
        time = microseconds([runner(prepared, inputs, output) for inputs in sets])
        yield row_of(case, dtype, tactic.name, time, error, read)


def measure_peer(case: Case, dtype: torch.dtype, read: float) -> Iterator[Row]:
    """cuDNN's attention as torch calls it, on queries and keys that are rotated already and a cache that is written: less than
    the op does. No row where it does not run the case; it knows no queries behind a past."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if (case.past and case.new > 1) or case.cache != FLOATS:
        return
    sets = []
    for _ in range(copies(case)):
        query, _, _, _, _, _, keys, values = random_inputs(case, dtype)
        heads = query.view(case.batch, case.new, case.heads, case.head_dim).transpose(1, 2)
        sets.append((heads, keys[:, :, : case.past + case.new], values[:, :, : case.past + case.new]))

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        causal = case.new > 1
        torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=causal, enable_gqa=True)

    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            time = microseconds([partial(attend, *each) for each in sets])
    except RuntimeError as error:
        print(f"cuDNN: {str(error).splitlines()[0]}", flush=True)
        return
    yield row_of(case, dtype, "cuDNN", time, None, read)


def row_of(case: Case, dtype: torch.dtype, tactic: str, time: float, error: float | None, read: float) -> Row:
    """The row of a measured ``time``, in µs; torch's rate is measured now."""
    matmul = matmul_peak(dtype)
    pairs = case.batch * case.new * (case.past + (case.new + 1) / 2)
    operations = 4 * pairs * case.heads * case.head_dim
    size = 2 * case.cache_bytes * case.batch * case.kv_heads * (case.past + case.new) * case.head_dim
    floor = max(1e6 * size / read, 1e6 * operations / matmul if case.new > 1 else 0)
    label, name = f"{case.batch} × {case.new} new, {case.past} past", str(dtype).removeprefix("torch.")
    label += "" if case.cache == FLOATS else f", {case.cache}"
    return Row(label, name, tactic, time, floor, floor / time, operations / time / 1e6, error, read, matmul)


def table_line(row: Row) -> str:
    error = "" if row.error is None else f"  error {row.error:.1e}"
    return (
        f"{row.case:39} {row.dtype:8} {row.tactic:10} {row.microseconds:8.1f} µs  floor {row.floor:7.1f}  "
        f"{100 * row.share:5.1f}%  {row.tflops:6.1f} TFLOP/s{error}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--caches", nargs="+", choices=OPS, default=[FLOATS], help="what caches hold")
    parser.add_argument("--only", choices=("decode", "prefill"), help="cases of one new token, or of more")
    options = parse_for_gpu(parser, arguments)
    cases = [case for case in CASES if options.only is None or (case.new == 1) == (options.only == "decode")]
    rows, read = [], read_bandwidth()
    for name in options.dtypes:
        dtype = getattr(torch, name)
        print(
            f"{name}: reading {read / 1e12:.2f} TB/s, matrix product {matmul_peak(dtype) / 1e12:.0f} TFLOP/s",
            flush=True,
        )
        for case in (replace(case, cache=cache) for case in cases for cache in options.caches):
            for row in (*measure(case, dtype, read), *measure_peer(case, dtype, read)):
                rows.append(row)
                print(table_line(row), flush=True)
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
