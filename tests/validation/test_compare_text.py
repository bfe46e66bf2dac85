"""Text of engines against Hugging Face's: equal, a tie, or wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moecompiler.tools import compare_text
from moecompiler.tools.compare_text import Row, compare, table_line

pytestmark = pytest.mark.xdist_group("validation")
SHIPPED = Path(__file__).parents[1] / "data" / "tiny-mixtral"
EXACT = np.array([[0.0, 5.0, 1.0], [3.0, 1.0, 2.98], [1.0, 2.0, 9.0]], np.float32)


def row(logits: np.ndarray) -> Row:
    """Of an engine with these logits where HF's are ``EXACT``."""
    tokens, wanted = (each.argmax(-1).tolist() for each in (logits, EXACT))
    return compare(0, [7] * 5, (tokens, logits), (wanted, EXACT), 0.05)


def test_equal() -> None:
    found = row(EXACT + 0.25)
    assert (found.equal, found.length, found.error_before, found.passed) == (3, 3, 0.25, True)
    assert "3 of 3 tokens" in table_line(found)


def test_a_tie() -> None:
    """0.02 decide between two tokens, and what comes later is not looked at."""
    logits = EXACT + np.array([[0.0, 0.01, 0.0], [0.0, 0.0, 0.03], [90.0, 0.0, 0.0]], np.float32)
    found = row(logits)
    assert (found.equal, found.passed) == (1, True)
    assert found.margin == pytest.approx(0.02, abs=1e-6)
    assert found.error == pytest.approx(0.03, abs=1e-6)
    assert found.error_before == pytest.approx(0.01, abs=1e-6)
    assert table_line(found).endswith("a tie")


@pytest.mark.parametrize(
    "change",
    [
        [[0.0, 0.0, 4.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],  # HF's choice was clear
        [[0.0, 0.0, 0.0], [0.0, -9.0, 0.03], [0.0, 0.0, 0.0]],  # the engine is wrong there, near as the two are
    ],
)
def test_no_tie(change: list[list[float]]) -> None:
    found = row(EXACT + np.array(change, np.float32))
    assert not found.passed
    assert table_line(found).endswith("NO TIE")


def test_engines_of_the_shipped_model(two_ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_dir", str(SHIPPED), "--prompts", "2", "--output_len", "8"]
    assert compare_text.main([str(tmp_path / "rows.json"), str(two_ranks), *words]) == 0
    assert "2 of 2 texts are HF's" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(each["prompt_tokens"], each["equal"]) for each in rows] == [(5, 8), (12, 8)]
    assert 0 < max(each["error_before"] for each in rows) < 1e-4


def test_no_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        compare_text.main([str(tmp_path / "rows.json"), str(tmp_path / "none"), "--model_dir", str(SHIPPED)])
    assert end.value.code == 2
    assert "none: not found" in capsys.readouterr().err
