"""``passes diff``: files and output directories, its exit status, and what it cannot compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Here

Engines = Callable[[str], Path]
pytestmark = pytest.mark.xdist_group("passes")


def test_directories_rank_by_rank(engines: Engines, here: Here) -> None:
    directory = engines("ep2")
    output = here("passes", "diff", directory / "export", directory / "optimize")
    assert (output.status, output.err) == (1, "")
    lines = output.out.splitlines()
    # the graphs of both ranks are the same, and so what changed in them
    assert [line for line in lines if line.startswith("---")] == ["--- rank 0..1"]
    assert "model.layers.0..3.self_attn.q_proj: 1 removed, 1 changed" in lines
    assert "lm_head: 2 removed, 1 changed" in lines
    ranks = json.loads(here("passes", "diff", directory / "export", directory / "optimize", "--json").out)
    assert [each["rank"] for each in ranks] == [0, 1]
    assert ranks[0]["ops"]["Constant"][1] == 0
    assert ranks[0] | {"rank": 1} == ranks[1]


def test_equal_graphs(engines: Engines, here: Here) -> None:
    """What a compile wrote stands for its optimized graphs."""
    directory = engines("ep2")
    output = here("passes", "diff", directory, directory / "optimize", "--rank", 1)
    assert (output.status, output.err) == (0, "")
    assert output.out.startswith("--- rank 1\nnodes: ")
    file = directory / "optimize" / "rank0.onnx"
    output = here("passes", "diff", file, file, "--json")
    assert output.status == 0
    (data,) = json.loads(output.out)
    assert (data["rank"], data["equal"], data["modules"]) == (None, True, {})
    # ranks differ by their weights alone
    output = here("passes", "diff", file, directory / "optimize" / "rank1.onnx")
    assert output.status == 1
    assert output.out.startswith("nodes: ")


def test_what_cannot_be_compared(engines: Engines, here: Here, tmp_path: Path) -> None:
    one, two = engines("one"), engines("ep2")
    file = two / "optimize" / "rank0.onnx"
    (tmp_path / "text.onnx").write_text("hello")
    for arguments, said in (
        ((one, file), f"{file}: is no output directory; compare two ONNX files, or two output directories"),
        ((one, two), "holds 1 rank(s) and"),
        ((file, file, "--rank", 0), "--rank 0: ONNX files have no ranks"),
        ((two, two, "--rank", 2), "--rank 2: the world has ranks 0 to 1"),
        ((file, tmp_path / "no.onnx"), "no.onnx: not found"),
        ((file, tmp_path / "text.onnx"), "text.onnx: is not an ONNX file"),
        ((one, tmp_path), "has no manifest.json"),
    ):
        output = here("passes", "diff", *arguments)
        assert (output.status, output.out) == (2, "")
        (line,) = output.complaints
        assert said in line
