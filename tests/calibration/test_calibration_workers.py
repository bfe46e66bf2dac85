"""Tasks on threads: in order, one thread of torch each, and none begun after an error."""

from __future__ import annotations

import threading

import pytest
import torch

from moecompiler.calibration.workers import workers


def test_results_come_in_order_and_torch_gets_its_threads_back() -> None:
    before = torch.get_num_threads()
    together = threading.Barrier(3, timeout=30)

    def work(item: int) -> tuple[int, int]:
        if item < 3:
            together.wait()  # which three threads reach, and fewer do not
        return item, torch.get_num_threads()

    with workers(3) as each:
        assert list(each(work, range(20))) == [(item, 1) for item in range(20)]
    assert torch.get_num_threads() == before


def test_an_error_ends_what_still_waits() -> None:
    begun: list[int] = []
    failed = threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            failed.set()
            raise ValueError("this one")
        failed.wait(30)
        threading.Event().wait(0.01)

    with pytest.raises(ValueError, match="this one"), workers(2) as each:
        list(each(work, range(1000)))
    assert len(begun) < 500
