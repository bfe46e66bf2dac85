"""The script that shows how stages overlap; here only that it measures what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moecompiler.tools import bench_pipeline

Engines = Callable[[str], Path]


def test_a_row_for_each_division(engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    sizes = ("--batch_size", "3", "--input_len", "8", "--output_len", "3", "--runs", "1", "--micro_batches", "3")
    assert bench_pipeline.main([str(output), str(engines("tp2-pp2")), *sizes]) == 0
    result = json.loads(output.read_text())
    assert [row["micro_batches"] for row in result["rows"]] == [1, 3]
    first, second = result["rows"]
    assert (first["prefill_gain"], first["most_in_prefill"], first["most_in_decode"]) == (1.0, 1.0, 1.0)
    assert (second["most_in_prefill"], second["most_in_decode"]) == (1.5, 2.0)
    assert second["prefill_gain"] == pytest.approx(first["prefill_s"] / second["prefill_s"])
    assert result["same_tokens"]
    assert "from stage to stage: host (threads of one process, on the CPU); ranks 0,2 1,3" in capsys.readouterr().out


def test_one_stage(engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_pipeline.main([str(tmp_path / "rows.json"), str(engines("one"))]) == 2
    assert "has one stage; compile with --pp_size 2 or more" in capsys.readouterr().err
