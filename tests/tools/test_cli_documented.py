"""docs/from-tensorrt-llm.md: its commands are run as they stand, on small checkpoints with the true models' head counts."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_hf, tiny_config
from cli import TESTS, Here, environment
from published import KINDS, save_published

PAGE = TESTS.parent / "docs" / "from-tensorrt-llm.md"
PROMPT = "I love french quiche"
SIZES = {"vocab_size": 300, "num_hidden_layers": 2, "head_dim": 4, "num_local_experts": 8}
HEADS = {"Mixtral-8x7B-v0.1": (32, 8), "Mixtral-8x22B-v0.1": (48, 8)}
MAPPINGS = {
    "pp2": {"tp_size": 1, "pp_size": 2, "moe_tp_size": 1, "moe_ep_size": 1},
    "tp2": {"tp_size": 2, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 1},
    "ep2": {"tp_size": 2, "pp_size": 1, "moe_tp_size": 1, "moe_ep_size": 2},
    "tp2ep2": {"tp_size": 4, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 2},
    "tp2ep4": {"tp_size": 8, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 4},
}


def runnable_commands() -> list[str]:
    blocks = re.findall(r"^```bash runnable\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n\s*", "", "".join(blocks)).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.xdist_group("documented")
def test_every_command_that_is_there(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (heads, kv_heads) in HEADS.items():
        config = tiny_config(**SIZES, num_attention_heads=heads, num_key_value_heads=kv_heads)
        save_hf(tmp_path / name, config, tokenizer=True)
    save_published(tmp_path / "tmp" / "mixtral-8x7b-v0.1-AWQ", KINDS["awq"])

    launched = 0
    for command in runnable_commands():
        program, *arguments = shlex.split(command)
        if program == "mpirun":
            launched += 1
            done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, env=environment())
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            assert done.stdout.startswith(PROMPT)
            assert "8 tokens: first token after" in done.stderr
        else:
            assert program == "moecompiler"
            output = here(*arguments)
            assert output.status == 0, f"{command}\n{output.err}"
            if "--gemm_plugin" in arguments:
                assert "note: --gemm_plugin float16: backend onnxruntime has no plugins" in output.out
    assert launched == 1

    engines = sorted((tmp_path / "trt_engines" / "mixtral").iterdir())
    assert {path.name for path in engines} == MAPPINGS.keys()
    logits = {}
    for path in engines:
        described = json.loads(here("inspect", path, "--json").out)
        assert (described["stage"], described["export"]["dtype"]) == ("engine", "float16")
        assert described["mapping"] == MAPPINGS[path.name]
        words = ("--max_output_len", 1, "--input_text", PROMPT, "--output_logits_npy", tmp_path / "logits.npy")
        assert here("run", "--engine_dir", path, "--in_process", *words).status == 0
        logits[path.name] = np.load(tmp_path / "logits.npy")
    for name in ("tp2", "ep2", "tp2ep2"):  # the same model, however it is split
        np.testing.assert_allclose(logits[name], logits["pp2"], atol=0.05)


def test_the_page_has_every_kind_of_command() -> None:
    """What a reader of the old page would look for is named here, be it there or not."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("convert_checkpoint.py --model_dir") == 7
    assert text.count("quantize.py --model_dir") == 2
    assert text.count("trtllm-build --checkpoint_dir") == 9
    assert len(runnable_commands()) == 19
