"""FP8 on the command line: calibrated and compiled in one go, compared with PyTorch that rounds as it does; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import PROMPT, TINY_MIXTRAL, Here, under_mpi

pytestmark = pytest.mark.xdist_group("quantization")
MODEL = ("--model_dir", TINY_MIXTRAL, "--num_layers", 2)
SMALL = (*MODEL, "--dtype", "float32", "--max_seq_len", 128)
CALIBRATED = ("--calib_size", 8, "--calib_max_seq_length", 64)
ONE_LAYER = ("--model_dir", TINY_MIXTRAL, "--num_layers", 1)
EP2 = ("--tp_size", 2, "--moe_ep_size", 2)


def done(here: Here, *arguments: object) -> str:
    output = here(*arguments)
    assert output.status == 0, output.out + output.err
    return output.out


def test_two_ranks_with_experts_apart(here: Here, tmp_path: Path) -> None:
    """Calibrated once, beside the output; every step after that goes by the scales in the manifest."""
    engines, kept = tmp_path / "engines", tmp_path / "engines.calibration"
    command = ("compile", *SMALL, *EP2, "--qformat", "fp8", *CALIBRATED, "--output_dir", engines)
    first = here(*command, "--pipeline", "plugins")
    assert first.status == 0, first.err
    assert f"kept in {kept}" in first.err
    assert (kept / "scales.json").is_file()
    again = here(*command, "--pipeline", "plugins")
    assert f"{kept} is up to date" in again.err
    data = json.loads(done(here, "inspect", engines, "--json"))
    assert len(data["quantization"]["input_scales"]) == 2 * (4 + 8 * 3)
    for rank in data["ranks"]:
        assert rank["quantized"] == {"schemes": {"float8_e4m3fn per tensor": 8}, "kept": []}
        assert (rank["ops"]["moecompiler::LinearFp8"], rank["ops"]["moecompiler::MoEFp8"]) == (4, 2)
    assert "static scales of 56 inputs" in " ".join(done(here, "inspect", engines).split())
    report = json.loads(done(here, "validate", engines, "--json", "--tokens", 300, "--layers"))
    assert report["passed"]
    assert min(part["own_relative"] for part in report["parts"]) < 1e-5
    (text,) = (each for each in report["quality"] if each["scenario"] == "text")
    assert 1e-4 < text["kl"] < 2e-2
    (*_, last) = json.loads(done(here, "passes", "verify", engines, "--pipeline", "ootb", "--json"))
    assert (last["name"], last["passed"]) == ("restore", True)
    assert last["hf"]["kl"] > 1e-3
    output = under_mpi(2, "run", "--engine_dir", engines, "--max_output_len", 4, "--input_text", PROMPT)
    assert output.status == 0, output.err
    assert PROMPT in output.out


def test_scales_of_a_calibration_by_itself(here: Here, tmp_path: Path) -> None:
    """Either of its files makes the same graphs as calibrating while compiling; tensor parallel, in float16."""
    made, exported = tmp_path / "calibration", tmp_path / "export"
    done(here, "calibrate", *ONE_LAYER, "--dtype", "float16", *CALIBRATED, "--output_dir", made)
    half = ("export", *ONE_LAYER, "--dtype", "float16", "--max_seq_len", 128, "--tp_size", 2, "--qformat", "fp8")
    manifests = []
    for name, scales in (
        ("measured", CALIBRATED),
        ("json", ("--scales", made / "scales.json")),
        ("all", ("--scales", made)),
    ):
        done(here, *half, *scales, "--output_dir", exported / name)
        manifests.append(json.loads((exported / name / "manifest.json").read_text())["header"]["quantization"])
    assert manifests[0] == manifests[1] == manifests[2]
    optimized, engines = tmp_path / "optimize", tmp_path / "engines"
    done(here, "optimize", "--checkpoint_dir", exported / "all", "--output_dir", optimized, "--pipeline", "plugins")
    done(here, "build", "--checkpoint_dir", optimized, "--output_dir", engines)
    assert json.loads(done(here, "validate", engines, "--json", "--tokens", 64, "--no_hf"))["passed"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--qformat", "fp8", "--calib_size", 0), "--calib_size 0"),
        (("--qformat", "fp8", "--scales", "missing.json"), "missing.json: not found; make it with"),
        (("--qformat", "fp8", "--group_size", 64), "scheme 'fp8' has no group_size"),
        (
            ("--qformat", "int8_wo", "--scales", TINY_MIXTRAL),
            "goes with --qformat fp8; --qformat int8_wo asks for no FP8",
        ),
        (("--qformat", "full_prec", "--scales", TINY_MIXTRAL), "goes with --qformat fp8"),
    ],
)
def test_what_cannot_be(here: Here, tmp_path: Path, options: tuple[object, ...], said: str) -> None:
    """One line, before any work, and nothing is left behind."""
    output = here("compile", *SMALL, *options, "--output_dir", tmp_path / "engines")
    assert output.status == 2
    (line,) = output.complaints
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_steps_that_have_no_scales(here: Here, tmp_path: Path) -> None:
    """``optimize`` and ``passes`` do not calibrate: they say what they want."""
    done(here, "export", *SMALL, "--output_dir", tmp_path / "export")
    for verb in (("optimize", "--checkpoint_dir", tmp_path / "export", "--output_dir", tmp_path / "o"),):
        output = here(*verb, "--qformat", "fp8")
        assert output.status == 2
        (line,) = output.complaints
        assert "q_proj is FP8, and there is no static scale of its inputs; give --scales" in line
