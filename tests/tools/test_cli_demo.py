"""``make demo``, without make."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli import environment


@pytest.mark.mpi
@pytest.mark.xdist_group("demo")
def test_the_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moecompiler.tools.demo", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("$ moecompiler compile", "def read_lines(path):", "$ moecompiler validate", "constant-folding", "ok"):
        assert part in done.stdout
    assert float(re.findall(r"tokens per second\W+(\d+)", done.stdout)[0]) > 0
    assert "FAIL" not in done.stdout
