"""The benchmark of quantizing runs, at a size that says nothing of speed, and leaves nothing behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from moecompiler.tools.bench_quantize import SCHEMES, main


def test_a_row_for_each_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--out", "8", "--in", "128", "--matrices", "2", "--threads", "1", "2", "--repeat", "1")
    monkeypatch.setattr(sys, "argv", ["bench_quantize", "--directory", str(tmp_path), "--dtype", "float16", *sizes])
    main()
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"float16 \[2, 8, 128\], 0\.00 GB; reading it from disk: [\d.]+ GB/s", first)
    assert [re.split(r"\s{2,}", row)[:2] for row in rows] == [[str(s), t] for s in SCHEMES for t in ("1", "2")]
    assert not list(tmp_path.iterdir())
