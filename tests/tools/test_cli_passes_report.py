"""``passes report``: the page is written whole or not at all, for a directory and for an ONNX file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from cli import Here
from graphs import program
from planted import LargeEpsilon

from moecompiler.passes.pipelines import named_pipelines
from moecompiler.passes.selection import Selection

pytestmark = pytest.mark.xdist_group("passes-cli")
Engines = Callable[[str], Path]


def data_of(page: Path) -> dict:  # type: ignore[type-arg]
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page.read_text())
    assert found is not None
    return json.loads(found[1])


def test_a_directory(engines: Engines, here: Here, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    output = here("passes", "report", engines("one"), "--output", page, "--pipeline", "plugins", "--no_verify")
    assert output.status == 0, output.err
    data = data_of(page)
    size = page.stat().st_size
    assert output.out == (
        f"wrote {page} ({size / 1e6:.1f} MB): {len(named_pipelines()['plugins'])} passes,"
        f" {data['matches']} rewrites of {data['kinds']} kinds\n"
    )
    assert size < 2_000_000
    assert data["passes"][0]["before"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_an_onnx_file_with_numbers(here: Here, tmp_path: Path) -> None:
    model, page = tmp_path / "model.onnx", tmp_path / "report.html"
    onnx.save(program("agraph (float[n] x) => (float[n] y) { p = Identity (x)  y = Neg (p) }").model, model)
    output = here("passes", "report", model, "--output", page, "--only_pass", "clean-up")
    assert output.status == 0, output.err
    assert output.out.endswith("2 passes, 1 rewrite of 1 kind, within tolerance\n")
    first, second = data_of(page)["passes"]
    assert (first["matches"], first["before"]["max_abs"], first["hf"]) == (1, 0, None)
    assert (second["matches"], second["kinds"]) == (0, [])


def test_a_wrong_pass_is_said_and_shown(
    engines: Engines, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Selection, "passes", lambda self: (*named_pipelines()["ootb"], LargeEpsilon(3)))
    page = tmp_path / "report.html"
    output = here("passes", "report", engines("one"), "--output", page, "--no_hf")
    assert output.status == 1
    assert output.out.endswith(", OUT OF TOLERANCE\n")
    assert data_of(page)["passes"][-1]["enters"] == "model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("target", "output", "complaint"),
    [
        ("model.onnx", "nowhere/report.html", "nowhere/report.html: its directory is not there"),
        ("model.onnx", ".", "is a directory"),
        ("missing.onnx", "report.html", "missing.onnx"),
        ("text.onnx", "report.html", "text.onnx: is not an ONNX file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    here: Here, tmp_path: Path, target: str, output: str, complaint: str
) -> None:
    onnx.save(program("agraph (float[2] x) => (float[2] y) { y = Neg (x) }").model, tmp_path / "model.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    said = here("passes", "report", tmp_path / target, "--output", tmp_path / output)
    assert said.status == 2
    assert said.err.count("\n") == 1
    assert complaint in said.err
    assert not (tmp_path / "report.html").exists()
