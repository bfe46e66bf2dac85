"""One program per row: float32 inside, rounded to the input's type before the weight."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, y, epsilon, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """``x [rows, HIDDEN]`` → ``y``; ``BLOCK`` is the power of two that holds ``HIDDEN``."""
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    column = tl.arange(0, BLOCK)
    there = column < HIDDEN
    wide = tl.load(x + row + column, mask=there, other=0.0).to(tl.float32)
    scaled = wide * (1.0 / tl.sqrt(tl.sum(wide * wide) / HIDDEN + epsilon))
    scale = tl.load(weight + column, mask=there, other=0.0)
    tl.store(y + row + column, scale * scaled.to(scale.dtype), mask=there)


@triton.jit
def add_rms_norm(residual, branch, weight, y, x, epsilon, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """``x = residual + branch`` rounded to its type, and ``y`` its norm."""
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    column = tl.arange(0, BLOCK)
    there = column < HIDDEN
    total = tl.load(residual + row + column, mask=there, other=0.0) + tl.load(
        branch + row + column, mask=there, other=0.0
    )
    tl.store(x + row + column, total, mask=there)
    wide = total.to(tl.float32)
    scaled = wide * (1.0 / tl.sqrt(tl.sum(wide * wide) / HIDDEN + epsilon))
    scale = tl.load(weight + column, mask=there, other=0.0)
    tl.store(y + row + column, scale * scaled.to(scale.dtype), mask=there)
