"""Tasks on several threads, each of which calculates by itself: results have the same bits whatever their number."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST_THREADS = 16  # more would want more memory than they save time


class Each(Protocol):
    """Applies a function to every item, at the same time if it can, and gives the results in the items' order."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]: ...


@contextmanager
def workers(threads: int | None = None) -> Iterator[Each]:
    """``threads``: how many (default: as many as there are cores, at most 16). Inside, torch uses one thread for each."""
    import torch

    count = threads or min(os.cpu_count() or 1, MOST_THREADS)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # how many threads a product is split over may change its last bit
    try:
        pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

        def each(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
            return pool.map(function, items)

        try:
            yield each
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C nobody wants what still waits
    finally:
        torch.set_num_threads(before)
