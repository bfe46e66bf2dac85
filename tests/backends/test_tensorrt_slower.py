"""Engines are told of where their weights as codes were measured slower than float ones."""

from __future__ import annotations

import pytest

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.tensorrt_slower import SPEEDUPS, slower_notes


@pytest.mark.parametrize(
    ("batch", "tokens", "most", "told"),
    [(8, 32, None, False), (8, 33, None, True), (64, 64, 256, False), (64, 64, 257, True), (4, 64, 8192, False)],
)
def test_the_largest_step_decides(batch: int, tokens: int, most: int | None, told: bool) -> None:
    """That is all that is asked for at once, or as much of it as goes in a step."""
    notes = slower_notes(["MoEInt4", "MoEInt4", "Attention"], EngineLimits(batch, tokens, 4096, 8, most), 90)
    assert len(notes) == told
    for note in notes:
        assert note.startswith(
            "MoEInt4: steps of 1024 tokens were measured slower than with float16 weights (0.87x at 1024)"
        )
        assert f"takes up to {min(batch * tokens, most or 1 << 30)} " in note


def test_each_op_is_told_of() -> None:
    limits = EngineLimits(8, 512, 4096, 8)
    told = [note.partition(":")[0] for note in slower_notes(SPEEDUPS, limits, 90)]
    assert (
        told == [op for op in sorted(SPEEDUPS) if min(SPEEDUPS[op].values()) < 1] == ["MoEInt4", "MoEInt8", "MoENvfp4"]
    )
    assert slower_notes(SPEEDUPS, limits, 89) == []
