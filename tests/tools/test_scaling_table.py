"""The tables of docs/scaling.md are what the script prints; the benchmark of exports says what misses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import PRESETS, load_config
from moecompiler.sparse_checkpoint import write_sparse_checkpoint
from moecompiler.tools import scaling_table
from moecompiler.tools.bench_export import MAPPINGS, Row, Used, table_row, timed

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_page_has_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    commands = re.findall(r"^    python -m moecompiler\.tools\.scaling_table (.*)$", text, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        assert scaling_table.main(command.split()) == 0
        assert capsys.readouterr().out.strip() in text


@pytest.mark.parametrize(("model", "shards", "size"), [("8x7b", 19, 93_405_585_408), ("8x22b", 59, 281_241_268_224)])
def test_sparse_checkpoints_are_of_the_published_shape(model: str, shards: int, size: int, tmp_path: Path) -> None:
    assert write_sparse_checkpoint(PRESETS[model], tmp_path / "sparse") == size
    config = load_config(tmp_path / "sparse")
    assert config == PRESETS[model]
    source = open_checkpoint(tmp_path / "sparse", config)
    assert len(source.files) == shards
    assert sum(path.stat().st_size for path in source.files) > size
    assert sum(path.stat().st_blocks * 512 for path in source.files) < 10_000_000


def test_used_is_of_the_largest_process() -> None:
    """A child's memory counts, and so does what it did; that of who measures does not."""
    mine = bytearray(800 << 20)
    mine[::4096] = mine[1::4096]
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(300 << 20); x[::4096] = x[1::4096]'])"
    used = timed([sys.executable, "-c", child])
    assert used.status == 0
    assert 0.29 < used.peak_gib < 0.6
    assert timed([sys.executable, "-c", "raise SystemExit(3)"]).status == 3


def test_what_misses_is_said() -> None:
    good = Used(5.0, 4.0, 1.0, 0)
    weights = 1_000_000
    assert Row("8x7b", "tp8", 8, 2, good, good, 9_000, weights).misses == []
    bad = Row("8x7b", "tp8", 1, 1, Used(61.0, 1.0, 3.5, 0), good, 11_000, weights)
    assert bad.misses == ["peak over 3.0 GiB", "over 60.0 s a rank", "wrote over 1%"]
    assert table_row(bad).endswith("| 66.0 | 3.50 | 1.100% | peak over 3.0 GiB, over 60.0 s a rank, wrote over 1% |")
    assert set(MAPPINGS) == {"tp8", "ep8", "tp4×ep2·pp2"}


def test_it_says_what_model_there_is_not() -> None:
    command = [sys.executable, "-m", "moecompiler.tools.scaling_table", "--model", "9x9b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("moecompiler: error: 9x9b")
