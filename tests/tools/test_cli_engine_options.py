"""Options of engines with plugins: read before any work is done, and refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli import TINY_MIXTRAL, Here

COMPILE = ("compile", "--model_dir", TINY_MIXTRAL, "--dtype", "float16", "--max_seq_len", "128")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--plugins", "gemm=on"), "--plugins: there is no op 'gemm'; choose from moe, attention, rmsnorm"),
        (("--plugin_tactics", "whole"), "--plugin_tactics whole: only interpreted plugins are told their plans"),
        (("--moe_plugin", "bfloat16"), "--moe_plugin bfloat16: the graph is float16"),
        (("--gpt_attention_plugin", "bfloat16"), "--gpt_attention_plugin bfloat16: the graph is float16"),
        (("--max_num_tokens", "100"), "--max_num_tokens 100: a step must hold a prompt of --max_input_len 127"),
        (("--backend", "tensorrt"), "TensorRT is not installed: pip install 'moecompiler[tensorrt]'"),
        (("--moe_weights", "nowhere"), "'nowhere' is not one of"),
    ],
)
def test_refused_before_any_work(
    arguments: tuple[str, ...], said: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    output = here(*COMPILE, "--output_dir", tmp_path / "out", *arguments)
    assert output.status == 2
    (line,) = output.complaints
    assert said in line
    assert not (tmp_path / "out").exists()
