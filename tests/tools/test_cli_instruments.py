"""What is shown of passes while they run: their times, graphs as text and as files that run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import ONE_RANK, TINY_MIXTRAL, Here, contents, logits

from moecompiler.tools import instruments

Engines = Callable[[str], Path]
pytestmark = pytest.mark.xdist_group("passes")

PLUGINS = ("--pipeline", "plugins")


@pytest.fixture
def optimized(engines: Engines, tmp_path: Path) -> tuple[object, ...]:
    """The words of a command that optimizes the shipped model on one rank into ``tmp_path / "out"``."""
    return "optimize", "--checkpoint_dir", engines("one") / "export", "--output_dir", tmp_path / "out"


def test_dumped_graphs_run_as_they_are(optimized: tuple[object, ...], here: Here, tmp_path: Path) -> None:
    """Fused ops too, and all say the same. An option that is gone takes with it what it had written."""
    output = here(*optimized, *PLUGINS, "--dump_passes=changed")
    assert (output.status, output.err) == (0, "")
    dumps = tmp_path / "out" / "passes" / "rank0"
    passes = json.loads(here("inspect", tmp_path / "out", "--json").out)["ranks"][0]["passes"]
    changed = [f"{index:02}-{each['name']}.onnx" for index, each in enumerate(passes, 1) if each["matches"]]
    assert len(changed) > 6
    assert sorted(contents(dumps)) == ["00-given.onnx", *changed, "weights.safetensors"]
    wanted = logits(dumps / "00-given.onnx")
    for name in changed:
        np.testing.assert_allclose(logits(dumps / name), wanted, atol=2e-4, err_msg=name)

    assert (
        here(*optimized, *PLUGINS, "--stop_after", "03-constant-folding", "--dump_passes", "--no_dump_weights").status
        == 0
    )
    names = ["00-given", "01-constant-folding", "02-clean-up", "03-constant-folding"]
    assert sorted(contents(dumps)) == [f"{name}.onnx" for name in names]
    assert here(*optimized, *PLUGINS).status == 0
    assert {*contents(tmp_path / "out")} == {"manifest.json", "rank0.onnx", "rank0.weights.json"}
    assert not dumps.exists()


def test_times_and_graphs_are_printed(optimized: tuple[object, ...], here: Here, tmp_path: Path) -> None:
    """Each time they are asked for, and what is written stays the same."""
    assert here(*optimized).status == 0
    first = contents(tmp_path / "out")
    output = here(*optimized, "--time_passes", "--print_after", "clean-up")
    assert (output.status, output.err) == (0, "")
    assert contents(tmp_path / "out") == first
    lines = output.out.splitlines()
    after = [line for line in lines if line.startswith("---")]
    assert after == ["--- rank 0 after 02-clean-up ---", "--- rank 0 after 04-clean-up ---"]
    graph = lines[lines.index(after[0]) + 1 : lines.index(after[1])]
    assert graph[0] == "input input_ids int64[batch, sequence]"
    assert "model.layers.3.mlp.experts" in graph
    assert not any(" = Identity(" in line for line in graph)
    table = [line.split("│")[1:-1] for line in lines if line.startswith("│")]
    assert [cells[0].strip() for cells in table] == [
        *(f"{index:02}-{name}" for index, name in enumerate(("constant-folding", "clean-up") * 2, 1)),
        "all",
    ]
    matches = [int(cells[1]) for cells in table]
    assert matches[-1] == sum(matches[:-1]) > 0
    assert float(table[-1][3]) > 0
    only = here(*optimized, "--print_after", "02-clean-up")
    assert [line for line in only.out.splitlines() if line.startswith("---")] == after[:1]


def test_a_graph_is_printed_before_a_pass_that_fails(optimized: tuple[object, ...], here: Here, tmp_path: Path) -> None:
    """It is looked at to learn why."""
    output = here(
        *optimized, "--pipeline", "clean-up,fuse-moe", "--print_after", "clean-up", "--print_after", "fuse-moe"
    )
    assert output.status == 2
    assert output.out.startswith("--- rank 0 after 01-clean-up ---\ninput input_ids int64[batch, sequence]\n")
    assert "after 02" not in output.out
    (line,) = output.complaints
    assert "pass fuse-moe: did not match in model.layers.0.mlp.experts (nearest miss: " in line
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_not_done_again(optimized: tuple[object, ...], here: Here, tmp_path: Path) -> None:
    arguments = (*optimized, "--dump_passes")
    assert here(*arguments).status == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    assert len(files) == 9
    assert here(*arguments).status == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    next(path for path in files if path.name == "weights.safetensors").unlink()
    assert here(*arguments).status == 0
    assert all(path.is_file() for path in files)


def test_a_compile_takes_them_too(engines: Engines, here: Here, tmp_path: Path) -> None:
    directory = shutil.copytree(engines("one"), tmp_path / "one")
    engine = (directory / "rank0.safetensors").stat().st_mtime_ns
    output = here(
        "compile",
        *("--model_dir", TINY_MIXTRAL, "--output_dir", directory, *ONE_RANK),
        *("--dump_passes=changed", "--no_dump_weights", "--time_passes"),
    )
    assert (output.status, output.err) == (0, "")
    assert "02-clean-up" in output.out
    dumps = directory / "optimize" / "passes" / "rank0"
    assert sorted(contents(dumps)) == ["00-given.onnx", "01-constant-folding.onnx", "02-clean-up.onnx"]
    # the graph is what it was, and so is the engine
    assert (directory / "rank0.safetensors").stat().st_mtime_ns == engine


@pytest.mark.parametrize("verb", ["compile", "optimize", "build"])
def test_a_pass_that_does_not_run_is_not_printed(verb: str, engines: Engines, here: Here, tmp_path: Path) -> None:
    """Nothing is done first."""
    source = ("--model_dir", TINY_MIXTRAL) if verb == "compile" else ("--checkpoint_dir", engines("one") / "export")
    output = here(verb, *source, "--output_dir", tmp_path / "out", "--print_after", "fuse-moe")
    assert (output.status, output.out) == (2, "")
    (line,) = output.complaints
    assert "--print_after fuse-moe: is not in pipeline ootb, which is 01-constant-folding, " in line
    assert not (tmp_path / "out").exists()


def test_a_dump_that_fails(
    optimized: tuple[object, ...], here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is beyond float16, say: one line, and nothing half-written."""

    def fails(programs: object, reader: object, path_of: Callable[[str], Path], progress: object) -> None:
        path_of("00-given.onnx").write_bytes(b"half")
        raise OverflowError("lm_head.weight: holds values beyond float16's range; use --dtype bfloat16")

    monkeypatch.setattr(instruments, "write_dumps", fails)
    output = here(*optimized, "--dump_passes")
    assert (output.status, output.out) == (2, "")
    (line,) = output.complaints
    assert line.endswith("holds values beyond float16's range; use --dtype bfloat16, or --no_dump_weights")
    assert not (tmp_path / "out").exists()
