"""A kernel that reads memory and does nothing else: the ceiling of whatever is bound by reading."""

import triton
import triton.language as tl


@triton.jit
def read(x, y, rounds, BLOCK: tl.constexpr):
    """Each program reads ``rounds * BLOCK`` numbers of ``x``; what is written to ``y`` never is, but depends on all of them."""
    total = tl.zeros([BLOCK], tl.int32)
    first = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    for i in range(rounds):
        total ^= tl.load(x + first + i * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    if tl.max(total, 0) == 0x7FFFFFFF:
        tl.store(y + tl.program_id(0), 1)
