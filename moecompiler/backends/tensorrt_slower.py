"""Where plugins over codes have been measured slower than those over float16 weights, and what to say of an engine with such.

Weights are in an engine as codes alone, so it cannot choose by step. It can be told of when it is built: few tokens read less
memory as codes and are faster throughout; with many, arithmetic is what takes time, and codes cost some on top.

The figures are of an NVIDIA H100 80GB HBM3, float16, 2026-11-25 (docs/benchmarks/quantized-2026-11-25.md). MoE: a layer of
Mixtral-8x7B in an engine (``bench_engine_quantized_moe``), asymmetric int4 by itself (``bench_quantized_moe``). Linear: its
query, key and value projection by itself (``bench_quantized_linear``), beside cuBLAS. Attention: 32/8 heads of 128, prefill
without a past (``bench_attention``), beside floats. int4 is in groups of 128. Other layers were not measured so, nor other GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable

from moecompiler.backends.base import EngineLimits

MEASURED_ON = 90  # compute capability

# op → tokens of a step → how many times as fast as with float16 weights
SPEEDUPS: dict[str, dict[int, float]] = {
    "AttentionFp8Context": {128: 0.93, 1024: 0.65, 4096: 0.65, 16384: 0.64},
    "LinearFp8": {1: 1.91, 4: 1.39, 16: 1.36, 64: 1.49, 256: 1.34, 1024: 1.37, 4096: 1.64},
    "LinearInt4": {1: 2.03, 4: 1.87, 16: 1.86, 64: 1.01, 256: 0.54, 1024: 0.74, 4096: 0.99},
    "LinearInt4Asymmetric": {1: 2.00, 4: 1.73, 16: 1.72, 64: 1.01, 256: 0.52, 1024: 0.72, 4096: 0.94},
    "LinearInt8": {1: 1.79, 4: 1.40, 16: 1.40, 64: 0.96, 256: 0.68, 1024: 0.77, 4096: 1.03},
    "LinearNvfp4": {1: 2.11, 4: 1.78, 16: 1.78, 64: 0.93, 256: 0.52, 1024: 0.73, 4096: 0.96},
    "MoEFp8": {1: 1.82, 4: 1.87, 16: 1.95, 64: 1.98, 256: 1.96, 1024: 1.62, 4096: 1.66},
    "MoEInt4": {1: 1.78, 4: 2.99, 16: 2.60, 64: 2.45, 256: 1.55, 1024: 0.82, 4096: 0.94},
    "MoEInt4Asymmetric": {1: 1.82, 4: 2.00, 16: 1.50, 64: 2.30, 256: 1.51, 1024: 0.78, 4096: 0.93},
    "MoEInt8": {1: 1.82, 4: 1.94, 16: 1.89, 64: 1.93, 256: 1.56, 1024: 0.88, 4096: 0.97},
    "MoENvfp4": {1: 1.60, 4: 2.08, 16: 2.21, 64: 2.22, 256: 1.55, 1024: 0.86, 4096: 0.94},
}


def most_tokens(limits: EngineLimits) -> int:
    """Of one step, padding included."""
    whole = limits.max_batch_size * limits.max_input_len
    return whole if limits.max_num_tokens is None else min(whole, limits.max_num_tokens)


def slower_notes(ops: Iterable[str], limits: EngineLimits, sm: int) -> list[str]:
    """A line for each op, of those that are plugins, with which the engine may take longer than with float16 weights: its steps
    go beyond what was measured to be faster, towards what was measured to be slower."""
    if sm != MEASURED_ON:
        return []
    notes, most = [], most_tokens(limits)
    for op in sorted(set(ops) & set(SPEEDUPS)):
        slow = [tokens for tokens, speedup in SPEEDUPS[op].items() if speedup < 1]
        fast = max((tokens for tokens in SPEEDUPS[op] if slow and tokens < slow[0]), default=0 if slow else most)
        if most > fast:
            worst = min(slow, key=SPEEDUPS[op].__getitem__)
            faster = f", those of up to {fast} faster" if fast else ""
            notes.append(
                f"{op}: steps of {slow[0]} tokens were measured slower than in float16 ({SPEEDUPS[op][worst]:.2f}x at "
                f"{worst}){faster}; the engine takes up to {most} (--max_num_tokens)"
            )
    return notes
