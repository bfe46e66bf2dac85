"""Where plugins over codes have been measured slower than those over float16 weights, and what to say of an engine with such.

Weights are in an engine as codes alone, so it cannot choose by step. It can be told of when it is built: few tokens read less
memory as codes and are faster throughout; with many, arithmetic is what takes time, and codes cost some on top.

The figures are of one MoE layer of Mixtral-8x7B in an engine of its own: NVIDIA H100 80GB HBM3, TensorRT 10.6, float16,
2026-11-25, by ``python -m moecompiler.tools.bench_engine_quantized_moe FILE --tokens 1 16 64 1024 4096``, and at 256 tokens by
``bench_quantized_moe``; int4 in groups of 128. FP8 was faster at all of them. Other layers were not measured so, nor other GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable

from moecompiler.backends.base import EngineLimits

MEASURED_ON = 90  # compute capability

# op → tokens of a step → how many times as fast as with float16 weights
SPEEDUPS: dict[str, dict[int, float]] = {
    "MoEInt8": {1: 1.57, 16: 1.79, 64: 1.42, 256: 1.61, 1024: 0.91, 4096: 1.02},
    "MoEInt4": {1: 2.33, 16: 2.64, 64: 1.30, 256: 1.61, 1024: 0.87, 4096: 1.00},
    "MoEFp8": {1: 1.58, 16: 1.81, 64: 1.96, 256: 1.96, 1024: 1.60, 4096: 1.67},
    "MoENvfp4": {1: 1.14, 16: 1.41, 64: 2.21, 256: 1.54, 1024: 0.86, 4096: 0.94},
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
        fast = max((tokens for tokens in SPEEDUPS[op] if slow and tokens < slow[0]), default=most)
        if most > fast:
            worst = min(slow, key=SPEEDUPS[op].__getitem__)
            notes.append(
                f"{op}: steps of {slow[0]} tokens were measured slower than with float16 weights ({SPEEDUPS[op][worst]:.2f}x at "
                f"{worst}), those of up to {fast} faster; the engine takes up to {most} (--max_num_tokens; FP8 has no such range)"
            )
    return notes
