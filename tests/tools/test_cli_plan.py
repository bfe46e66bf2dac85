"""``plan``: the recommendation printed, as JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import TINY_MIXTRAL, Here


def test_the_command_of_the_documentation(here: Here) -> None:
    output = here("plan", "--model", "8x22b", "--gpus", 16, "--gpu-memory", "80GB")
    assert output.status == 0
    lines = output.out.splitlines()
    assert lines[0].startswith("16 × h100 of 80.0 GB (3.13 TB/s, measured), 8 a node; 8 sequences of 2048 tokens")
    assert lines[1].split() == ["mapping", "weights", "cache", "work", "GB", "floor", "expected", "fits"]
    assert lines[2].split()[:2] == ["tp16", "17.7"]
    assert "recommended: --tp_size 16 --moe_tp_size 16 --moe_ep_size 1 --pp_size 1" in lines
    assert any("cross nodes" in line and "tp8·pp2 answers sooner" in line for line in lines)


def test_json_and_codes(here: Here) -> None:
    asked = ("plan", "--model", "8x7b", "--gpus", 2, "--gpu", "h200", "--max_batch_size", 4, "--json")
    plain, codes = (
        json.loads(here(*asked, *more).out) for more in ((), ("--qformat", "fp8", "--kv_cache_dtype", "fp8"))
    )
    assert plain["recommended"] == {"tp_size": 2, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 1}
    sizes = [each["plans"][0]["memory"] for each in (plain, codes)]
    assert sizes[0]["cache"] == 2 * sizes[1]["cache"] == 131072 * 4 * 2048 // 2
    assert 0.5 < sizes[1]["weights"] / sizes[0]["weights"] < 0.51
    steps = [each["plans"][0]["decode_step"] for each in (plain, codes)]
    assert 1.9 < steps[0]["working_s"] / steps[1]["working_s"] < 2
    assert plain["gpus"]["gpu"]["memory"] == 141e9
    assert plain["least_gpus"] == 1


def test_a_checkpoint_s_config_is_enough(here: Here, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINY_MIXTRAL / "config.json").read_text())
    data = json.loads(here("plan", "--model_dir", tmp_path, "--gpus", 1, "--max_seq_len", 128, "--json").out)
    assert data["recommended"] is not None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--gpu", "abacus"), "--gpu abacus: unknown; known are a100, l40s, h100"),
        (("--gpu-memory", "much"), "--gpu_memory much: give a size as in 80GB"),
        (("--model_dir", "somewhere"), "give --model_dir, or --model"),
        (("--network", "0"), "--network 0.0: give the GB a second"),
        (("--max_batch_size", "0"), "--max_batch_size 0: give 1 or more"),
        (("--max_num_tokens", "3"), "--max_num_tokens 3: a step holds a token of each of 8 sequences"),
        (("--max_seq_len", "100000"), "--max_seq_len 100000: give 2 to 32768"),
        (("--qformat", "int4_wo", "--group_size", "12"), "group_size is 12"),
    ],
)
def test_what_makes_no_sense(more: tuple[str, ...], said: str, here: Here) -> None:
    output = here("plan", "--model", "8x7b", "--gpus", 8, *more)
    assert (output.status, output.out) == (2, "")
    assert len(output.complaints) == 1
    assert said in output.err
