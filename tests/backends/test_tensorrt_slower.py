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
            "MoEInt4: steps of 1024 tokens were measured slower than in float16 (0.82x at 1024), those of up to 256 faster"
        )
        assert f"takes up to {min(batch * tokens, most or 1 << 30)} " in note


def test_each_op_is_told_of() -> None:
    limits = EngineLimits(8, 512, 4096, 8)
    told = [note.partition(":")[0] for note in slower_notes(SPEEDUPS, limits, 90)]
    assert told == [op for op in sorted(SPEEDUPS) if min(SPEEDUPS[op].values()) < 1]
    assert {"MoEFp8", "LinearFp8"}.isdisjoint(told)
    assert len(told) == len(SPEEDUPS) - 2
    assert slower_notes(SPEEDUPS, limits, 89) == []


def test_what_was_never_faster() -> None:
    (note,) = slower_notes(["AttentionFp8Context"], EngineLimits(1, 64, 128, 8), 90)
    assert note == (
        "AttentionFp8Context: steps of 128 tokens were measured slower than in float16 (0.64x at 16384); "
        "the engine takes up to 64 (--max_num_tokens)"
    )
