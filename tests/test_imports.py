"""Imports: they point one way, the lint rule that says so works, and starting the command line imports nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# who may import whom: moecompiler ◄ plugins ◄ passes ◄ tools
ORDER = ("moecompiler", "plugins", "passes", "tools")
PACKAGES = {name: "moecompiler" if name == "moecompiler" else f"moecompiler.{name}" for name in ORDER}
HEAVY = ("torch", "tensorrt", "transformers", "onnxruntime_extensions", "onnxruntime", "triton", "polygraphy")


def lint(file: str, line: str) -> subprocess.CompletedProcess[str]:
    """What ruff says of one line in a file of that name, which need not exist; it reads the file by the folder's rules."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "--stdin-filename", file, "-"]
    return subprocess.run(command, input=f"{line}\n", cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("imported", ORDER[1:])
@pytest.mark.parametrize("importer", ORDER)
def test_direction(importer: str, imported: str) -> None:
    """Each way to write an import upwards is an error; downwards, and within a package, each is legal."""
    upwards = ORDER.index(imported) > ORDER.index(importer)
    lines = (
        f"import {PACKAGES[imported]}.something",
        f"import {PACKAGES[imported]}.something as other",
        f"from {PACKAGES[imported]} import something",
        f"from {PACKAGES[imported]}.something import thing",
        f"from moecompiler import {imported}",
        f"def function():\n    from {PACKAGES[imported]}.something import thing",
    )
    said = lint(f"{importer}/x.py", "\n".join(lines))
    assert said.returncode == (1 if upwards else 0), said.stdout + said.stderr
    assert said.stdout.count("TID251") == (len(lines) if upwards else 0)


@pytest.mark.parametrize("file", ["moecompiler/backends/x.py", "moecompiler/runtime/x.py", "plugins/moe/x.py"])
def test_folders_below_are_covered(file: str) -> None:
    assert lint(file, "from moecompiler.tools.main import main").returncode == 1


@pytest.mark.parametrize("importer", ORDER)
def test_everyone_may_import_the_core(importer: str) -> None:
    assert lint(f"{importer}/x.py", "from moecompiler.graph import Program").returncode == 0


def test_the_code_keeps_the_direction() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", *ORDER]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stdout


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh process has loaded after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(said.stdout.splitlines()[-1]))


def test_starting_is_light() -> None:
    """The command line answers ``--help`` and wrong arguments before anything heavy is imported."""
    loaded = modules_after("import moecompiler.tools.main")
    assert "moecompiler.tools.main" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("module", ["config", "mapping", "sharding", "weights", "checkpoint", "graph", "pipeline"])
def test_modules_without_torch(module: str) -> None:
    """What every rank imports at run time, and what passes are made of, needs neither torch nor an engine's library."""
    assert modules_after(f"import moecompiler.{module}").isdisjoint(HEAVY)
