"""Work on a large weight in pieces that a core's cache holds, by several threads: numpy lets others run while it calculates."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np

from moecompiler.weights import Shape

CHUNK = 1 << 18  # elements: with fewer, Python takes as long as numpy, and threads wait for each other's interpreter


class Scratch:
    """Called as ``np.empty``, gives the same memory again and again: one array of a dtype is in use at a time.

    Asking the system for memory with every chunk takes as long as the arithmetic, and threads wait for each other at it.
    """

    def __init__(self) -> None:
        self._memory: dict[np.dtype, np.ndarray] = {}

    def __call__(self, shape: Shape, dtype: np.dtype | type) -> np.ndarray:
        size, dtype = prod(shape), np.dtype(dtype)
        if dtype not in self._memory or self._memory[dtype].size < size:
            self._memory[dtype] = np.empty(size, dtype)
        return self._memory[dtype][:size].reshape(shape)


Work = Callable[[int, slice, Scratch], None]


def as_matrices(values: np.ndarray, lead: int) -> np.ndarray:
    """``values`` with its first ``lead`` axes, be there one, several or none, made one."""
    return values.reshape(-1, *values.shape[lead:]) if lead else values[None]


def each_chunk(work: Work, shape: Shape, threads: int) -> None:
    """Calls ``work(m, rows, scratch)`` until all rows of all matrices of a weight of ``shape`` ``[..., out, in]`` have had their
    turn; ``m`` counts the matrices through. With several threads the order is open. Raises: what ``work`` raises."""
    count, (out, columns) = prod(shape[:-2]), shape[-2:]
    step = max(1, CHUNK // max(1, columns))
    chunks = [(m, slice(at, min(at + step, out))) for m in range(count) for at in range(0, out, step)]
    waiting = iter(chunks)

    def run() -> None:
        scratch = Scratch()
        try:
            for m, rows in waiting:
                work(m, rows, scratch)
        except BaseException:
            deque(waiting, maxlen=0)  # the other threads find nothing more to do
            raise

    threads = min(threads, len(chunks))
    if threads <= 1:
        run()
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run) for _ in range(threads)]:
            done.result()
