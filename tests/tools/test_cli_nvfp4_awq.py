"""NVFP4, and AWQ's search, on the command line: engines of two ranks, what is kept between runs, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import PROMPT, TINY_MIXTRAL, Here, under_mpi
from published import KINDS, save_published

pytestmark = pytest.mark.xdist_group("quantization")
SMALL = ("--model_dir", TINY_MIXTRAL, "--dtype", "float32", "--num_layers", 1, "--max_seq_len", 128)
APART = ("--tp_size", 2, "--moe_ep_size", 2)
LITTLE = ("--calib_size", 8, "--calib_max_seq_length", 64)
AWQ = ("--qformat", "int4_awq", "--group_size", 64, *LITTLE)


@pytest.mark.parametrize(
    ("options", "schemes"),
    [
        (("--qformat", "nvfp4", *LITTLE), {"float4_e2m1fn per block 16": 6}),
        (AWQ, {"int4 per block 64": 6}),
    ],
    ids=["nvfp4", "awq"],
)
def test_two_ranks_with_experts_apart(
    here: Here, tmp_path: Path, options: tuple[object, ...], schemes: dict[str, int]
) -> None:
    engines = tmp_path / "engines"
    output = here("compile", *SMALL, *APART, *options, "--output_dir", engines)
    assert output.status == 0, output.err
    for rank in json.loads(here("inspect", engines, "--json").out)["ranks"]:
        assert rank["quantized"] == {"schemes": schemes, "kept": []}
    assert json.loads(here("validate", engines, "--json", "--tokens", 128).out)["passed"]
    run = under_mpi(2, "run", "--engine_dir", engines, "--max_output_len", 4, "--input_text", PROMPT)
    assert run.status == 0, run.err
    assert PROMPT in run.out


def test_a_search_is_kept(here: Here, tmp_path: Path) -> None:
    """For the same model, text, options and recipe; later steps read weights through it and need no option."""
    exported, optimized = tmp_path / "export", tmp_path / "optimize"
    command = ("export", *SMALL, *AWQ, "--output_dir", exported)
    first = here(*command)
    assert "AWQ's scales are of 512 tokens, kept in" in first.err
    file = tmp_path / "export.calibration" / "awq.safetensors"
    written = file.read_bytes(), file.stat().st_mtime_ns
    assert "awq.safetensors is up to date" in here(*command).err
    assert written == (file.read_bytes(), file.stat().st_mtime_ns)
    verified = json.loads(here("passes", "verify", exported, "--pipeline", "plugins", "--json").out)
    assert (verified[-1]["name"], verified[-1]["passed"]) == ("quantize-weights", True)
    assert all(each["hf"]["max_abs"] < 1e-3 for each in verified[:-1])  # scaled, and the same function
    assert here(*command[:-4], "--calib_max_seq_length", 32, *command[-2:]).status == 0
    assert file.read_bytes() != written[0]
    file.write_bytes(written[0] + b" ")
    changed = here("optimize", "--checkpoint_dir", exported, "--output_dir", optimized)
    if changed.status == 0:  # which reads no weights
        changed = here("build", "--checkpoint_dir", optimized, "--output_dir", tmp_path / "engines")
    assert changed.status == 2
    assert "awq.safetensors: changed since it was first read" in changed.err


def test_what_cannot_be(here: Here, tmp_path: Path) -> None:
    save_published(tmp_path / "model", KINDS["awq"])
    refused = here("export", "--model_dir", tmp_path / "model", *AWQ, "--output_dir", tmp_path / "export")
    assert refused.status == 2
    assert "is quantized already; give the unquantized checkpoint" in refused.err
    groups = here("export", *SMALL, "--qformat", "int4_awq", "--group_size", 96, "--output_dir", tmp_path / "export")
    assert groups.status == 2
    assert "groups of 96 do not divide" in groups.err
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused = here("export", *SMALL, *AWQ, "--calib_dataset", empty, "--output_dir", tmp_path / "export")
    assert (refused.status, refused.err.count("\n")) == (2, 1), refused.err
