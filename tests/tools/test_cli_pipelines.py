"""Engines by named pipelines: fused ops, inlined by a backend without plugins, compute what plain operators do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moecompiler.tools.main import main

SHIPPED = Path(__file__).parents[1] / "data" / "tiny-mixtral"


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pipelines") / "fused"
    command = ["compile", "--model_dir", str(SHIPPED), "--output_dir", str(directory), "--max_seq_len", "96"]
    assert main([*command, "--tp_size", "2", "--moe_ep_size", "2", "--pipeline", "plugins"]) == 0
    return directory


@pytest.mark.xdist_group("pipelines")
def test_fused_ops_are_in_the_engine_and_agree_with_pytorch(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(fused), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    ops = described["ranks"][0]["ops"]
    assert {name: count for name, count in ops.items() if name.startswith("moecompiler::")} == {
        "moecompiler::AddRMSNorm": 7,
        "moecompiler::Attention": 4,
        "moecompiler::MoE": 4,
        "moecompiler::RMSNorm": 2,
    }
    matches = {step["name"]: step["matches"] for step in described["ranks"][1]["passes"]}
    assert matches["merge-qkv"] == 4
    assert main(["validate", str(fused), "--layers", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {part["module"] for part in report["parts"]} >= {"model.layers.0.self_attn", "model.layers.3.mlp", "lm_head"}


@pytest.mark.parametrize("verb", ["compile", "optimize", "build"])
def test_an_unknown_pipeline_is_refused(
    fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    capsys.readouterr()
    source = ["--model_dir", str(SHIPPED)] if verb == "compile" else ["--checkpoint_dir", str(fused / "export")]
    assert main([verb, *source, "--output_dir", str(tmp_path / "out"), "--pipeline", "nothing"]) == 2
    error = capsys.readouterr().err
    assert "--pipeline nothing: there is none of that name; choose from debug, onnxruntime, ootb, " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
