"""Work on a large weight in pieces that a core's cache holds, by several threads: numpy lets others run while it calculates."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np

from moecompiler.weights import Shape

CHUNK = 1 << 18  # elements: with fewer, Python takes as long as numpy, and threads wait for each other's interpreter

Work = Callable[[int, slice], None]


def as_matrices(values: np.ndarray, lead: int) -> np.ndarray:
    """``values`` with its first ``lead`` axes, be there one, several or none, made one."""
    return values.reshape(-1, *values.shape[lead:]) if lead else values[None]


def each_chunk(work: Work, shape: Shape, threads: int) -> None:
    """Calls ``work(m, rows)`` until all rows of all matrices of a weight of ``shape`` ``[..., out, in]`` have had their turn;
    ``m`` counts the matrices through. With several threads the order is open. Raises: what ``work`` raises."""
    count, (out, columns) = prod(shape[:-2]), shape[-2:]
    step = max(1, CHUNK // max(1, columns))
    chunks = [(m, slice(at, min(at + step, out))) for m in range(count) for at in range(0, out, step)]
    if threads <= 1 or len(chunks) <= 1:
        for chunk in chunks:
            work(*chunk)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(lambda chunk: work(*chunk), chunks):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
