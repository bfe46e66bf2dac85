"""``passes list``, and passes that other packages bring: found by their entry points, run as ours, and no harm where broken."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli import BIN, TESTS, Here, Output, environment, logits
from foreign_files import gated_layer, ops, outputs, save

from moecompiler.passes.pipelines import passes_by_name
from moecompiler.tools.passes.table import VERBS

Engines = Callable[[str], Path]
pytestmark = pytest.mark.xdist_group("passes")

EXAMPLE = "example.silu-by-tanh"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, installed by itself. From a copy, for builds leave files beside the sources."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(TESTS / "data" / "example-pass", folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", folder / "installed", source], check=True, capture_output=True, timeout=120)
    return folder / "installed"


def with_package(folder: Path, *arguments: object) -> Output:
    """The command line in a process that finds the package."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [str(BIN / "moecompiler"), *map(str, arguments)]
    done = subprocess.run(words, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    return Output(done.returncode, done.stdout, done.stderr)


def test_every_pass_of_ours_says_what_it_is(here: Here) -> None:
    data = json.loads(here("passes", "list", "--pipeline", "plugins", "--json").out)
    assert {each["name"].partition("-")[2] for each in data["passes"]} | {each["name"] for each in data["others"]} == {
        *passes_by_name()
    }
    for each in (*data["passes"], *data["others"]):
        assert all(each[key] for key in ("does", "needs", "must_match", "guarantees")), each["name"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_fits(columns: int, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    output = here("passes", "list")
    lines = output.out.splitlines()
    assert max(len(line) for line in lines) <= columns
    assert lines[0] == "pipeline ootb"
    assert lines[1].startswith("01-constant-folding")
    assert "pipelines: debug, ootb, plugins" in output.out.replace("\n", " ")
    assert not any("…" in line for line in lines)


def test_another_package_s_pass(installed: Path, engines: Engines, tmp_path: Path) -> None:
    listed = {
        each["name"]: each for each in json.loads(with_package(installed, "passes", "list", "--json").out)["others"]
    }
    assert listed[EXAMPLE] == {
        "name": EXAMPLE,
        "does": "Writes each SiLU with the hyperbolic tangent, for hardware that has no sigmoid.",
        "needs": "nothing",
        "must_match": "never: a model may use another activation",
        "guarantees": "no SiLU in float32 or float16 is left whose sigmoid nobody else reads",
    }
    arguments = ("optimize", "--checkpoint_dir", engines("one") / "export", "--output_dir", tmp_path / "out")
    arguments = (*arguments, "--pipeline", f"ootb,{EXAMPLE}", "--dump_passes=changed")
    output = with_package(installed, *arguments, "--time_passes")
    assert (output.status, output.err) == (0, "")
    (line,) = [line for line in output.out.splitlines() if EXAMPLE in line]
    assert line.split("│")[2].strip() == "4"  # one in each layer's experts
    graph = onnx.load(tmp_path / "out" / "rank0.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("Tanh") == 4
    assert "model.layers.3.mlp.experts/Mul_299.1.Tanh" in {node.name for node in graph.node}
    dumps = tmp_path / "out" / "passes" / "rank0"
    np.testing.assert_allclose(logits(dumps / f"05-{EXAMPLE}.onnx"), logits(dumps / "02-clean-up.onnx"), atol=2e-4)
    # what an older version of it made is made anew, and nothing else is
    graph_file = tmp_path / "out" / "rank0.onnx"
    written = graph_file.stat().st_mtime_ns
    assert with_package(installed, *arguments).status == 0
    assert graph_file.stat().st_mtime_ns == written
    newer = shutil.copytree(installed, tmp_path / "newer")
    with (newer / "example_pass.py").open("a") as file:
        file.write("# version 2\n")
    assert with_package(newer, *arguments).status == 0
    assert graph_file.stat().st_mtime_ns > written


def test_its_numbers(installed: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(installed)
    source, made = save(gated_layer(), tmp_path / "in.onnx", external=False), tmp_path / "out.onnx"
    assert here("optimize", source, "--output", made, "--pipeline", f"ootb,{EXAMPLE}").status == 0
    assert ops(made) == ["MatMul", "Mul", "Tanh", "Mul", "Add", "Mul", "MatMul"]
    np.testing.assert_allclose(outputs(made), outputs(source), rtol=1e-5, atol=1e-6)
    settled = here("optimize", made, "--output", tmp_path / "again.onnx", "--only_pass", EXAMPLE, "--pipeline", EXAMPLE)
    assert " 0 rewrites, " in settled.out


BROKEN = {
    "away": ("no_such_module:Pass", "cannot be loaded: ModuleNotFoundError(\"No module named 'no_such_module'\")"),
    "typo": ("broken_passes:Typo", "cannot be loaded: AttributeError("),
    "raises": ("broken_passes:Raises", "cannot be loaded: RuntimeError('no')"),
    "number": ("broken_passes:NUMBER", "cannot be loaded: TypeError("),
    "named-otherwise": ("broken_passes:Other", "broken_passes:Other is no pass of that name"),
    "no-pass": ("broken_passes:NoPass", "broken_passes:NoPass is no pass of that name"),
}
BROKEN_SOURCE = """
NUMBER = 1

class Raises:
    def __init__(self):
        raise RuntimeError("no")

class Other:
    name = "other"
    def rewrites(self, graph, weights):
        return iter(())

class NoPass:
    name = "no-pass"
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose entry points are all broken."""
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    entries = "".join(f"{name} = {value}\n" for name, (value, _) in BROKEN.items())
    (info / "entry_points.txt").write_text(f"[moecompiler.passes]\n{entries}")
    (tmp_path / "broken_passes.py").write_text(BROKEN_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_passes", raising=False)


@pytest.mark.usefixtures("broken")
def test_broken_entry_points(here: Here) -> None:
    """One line for who asks for one; who does not is not kept from anything."""
    for name, (_, said) in BROKEN.items():
        output = here("passes", "list", "--pipeline", f"ootb,{name}")
        assert (output.status, output.out) == (2, "")
        (line,) = output.complaints
        assert line.startswith(f"moecompiler: error: pass {name} of package broken: {said}")
    output = here("passes", "list", "--json")
    assert (output.status, output.err) == (0, "")
    errors = {each["name"]: each["error"] for each in json.loads(output.out)["others"] if "error" in each}
    assert errors.keys() == BROKEN.keys()
    assert here("passes", "list").status == 0


def test_the_page_shows_the_example() -> None:
    """docs/passes.md: the pass as it stands in the package, how it is registered, and every verb there is."""
    page = (TESTS.parent / "docs" / "passes.md").read_text(encoding="utf-8")
    package = TESTS / "data" / "example-pass"
    (shown,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert (package / "example_pass.py").read_text(encoding="utf-8").endswith(f"\n\n\n{shown}")
    (entry,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert entry in (package / "pyproject.toml").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"passes {verb} " in page, verb
