"""``inspect`` of engines that have a record, as TensorRT's have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from cli import Here

RECORD = {
    "made": {"tensorrt": "10.6.0", "sm": 90, "gpu": "NVIDIA H100", "driver": "13.0"},
    "prefill_rows": 2,
    "bound": ["position_ids"],  # of the inputs that this engine has
    "plugins": {"model.layers.0.mlp/MoE": "MoE", "model.layers.1.mlp/MoE": "MoE", "model.norm/RMSNorm": "RMSNorm"},
    "aliases": {"present.0.key": "past_key_values.0.key"},
}


def test_what_a_record_says(here: Here, engines: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(engines("one"), tmp_path / "engines")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["ranks"]["0"]["info"]["engine"] = RECORD
    (directory / "manifest.json").write_text(json.dumps(manifest))
    lines = [line.strip() for line in here("inspect", directory).out.splitlines()]
    assert "runs on: SM 90 (built on NVIDIA H100), TensorRT 10.6.0" in lines
    assert "plugins: MoE 2, RMSNorm 1; caches written in place: 1" in lines
    assert "weights bound at run time: 1" in lines
    (inputs,) = [line for line in lines if line.startswith("inputs:")]
    assert "input_ids" in inputs
    assert "position_ids" not in inputs
    assert json.loads(here("inspect", directory, "--json").out)["ranks"][0]["engine"] == RECORD
