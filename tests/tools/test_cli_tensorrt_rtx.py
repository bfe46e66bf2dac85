"""Backend ``tensorrt-rtx`` on the command line: engines are built and described here, and not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import PROMPT, Here, contents

pytestmark = pytest.mark.xdist_group("tensorrt-rtx")


def test_engines_are_built_described_and_not_run(here: Here, engines: Callable[[str], Path], tmp_path: Path) -> None:
    command = ("build", "--checkpoint_dir", engines("one") / "optimize", "--backend", "tensorrt-rtx")
    made = here(*command, "--output_dir", tmp_path / "a", "--compute_capability", "8.6, 12.0")
    assert made.status == 0, made.err
    assert (
        "note: engines run on RTX cards of compute capability 8.6 and 12.0, in NVIDIA's TensorRT-RTX runtime"
        in made.out
    )
    files = contents(tmp_path / "a")
    assert json.loads(files["rank0.engine.json"])["compute_capabilities"] == ["8.6", "12.0"]

    assert here(*command, "--output_dir", tmp_path / "a", "--compute_capability", "8.6,12.0").status == 0
    assert contents(tmp_path / "a") == files  # nothing is done twice: the builder would write other bytes

    described = json.loads(here("inspect", tmp_path / "a", "--json").out)
    assert described["ranks"][0]["ops"]["Softmax"] > 0
    for command in (
        ("run", "--engine_dir", tmp_path / "a", "--input_text", PROMPT, "--max_output_len", 4),
        ("validate", tmp_path / "a"),
    ):
        refused = here(*command)
        assert refused.status == 2
        assert refused.out == ""
        assert "holds engines for RTX cards, which run in NVIDIA's TensorRT-RTX runtime and not here" in refused.err
        assert len(refused.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("backend", "capabilities", "message"),
    [
        ("tensorrt-rtx", "8,9", "--compute_capability 8,9: give compute capabilities as in 8.9,12.0"),
        ("tensorrt-rtx", "9.0", "builds for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, not 9.0"),
        ("tensorrt-rtx", "7.5", "cards of 7.5 multiply matrices in float16 alone, not float32"),
        ("onnxruntime", "8.9", "backend onnxruntime builds for the machine it is on"),
    ],
)
def test_cards_that_cannot_be_are_refused(
    here: Here, engines: Callable[[str], Path], tmp_path: Path, backend: str, capabilities: str, message: str
) -> None:
    source = ("--checkpoint_dir", engines("one") / "optimize", "--output_dir", tmp_path / "out")
    refused = here("build", *source, "--backend", backend, "--compute_capability", capabilities)
    assert refused.status == 2
    assert message in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
