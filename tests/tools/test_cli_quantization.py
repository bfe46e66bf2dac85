"""Quantization on the command line: options and recipes, what manifests remember, engines of several ranks, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import PROMPT, TINY_MIXTRAL, Here, under_mpi

pytestmark = pytest.mark.xdist_group("quantization")
SMALL = ("--model_dir", TINY_MIXTRAL, "--dtype", "float32", "--num_layers", 1, "--max_seq_len", 128)
TP2 = ("--tp_size", 2)
INT4 = ("--use_weight_only", "--weight_only_precision", "int4", "--group_size", 64)
RECIPE = """rules:
- match: "*.experts.*"
  scheme: int4_asymmetric
  group_size: 64
- match: "*.o_proj"
  scheme: none
- match: "*.self_attn.*"
  scheme: int8
- match: lm_head
  scheme: int8
"""


def described(here: Here, directory: Path) -> dict[str, object]:
    data: dict[str, object] = json.loads(here("inspect", directory, "--json").out)
    return data


def done(here: Here, *arguments: object) -> str:
    output = here(*arguments)
    assert output.status == 0, output.out + output.err
    return output.out


def test_int8_on_two_ranks_with_experts_apart(here: Here, tmp_path: Path) -> None:
    """From checkpoint to text, under mpirun; as good as PyTorch with the numbers that codes stand for."""
    engines = tmp_path / "engines"
    done(here, "compile", *SMALL, *TP2, "--moe-ep-size", 2, "--use-weight-only", "--output_dir", engines)
    data = described(here, engines)
    for rank in data["ranks"]:
        assert rank["quantized"] == {"schemes": {"int8 per channel": 6}, "kept": []}
        assert rank["ops"]["DequantizeLinear"] == 6
    report = json.loads(done(here, "validate", engines, "--json", "--tokens", 64, "--layers"))
    assert report["passed"]
    assert max(each["relative"] for each in report["outputs"]) < 1e-5
    text = [each for each in report["quality"] if each["scenario"] == "text"]
    assert [0 < each["kl"] < 5e-3 for each in text] == [True]
    shown = " ".join(done(here, "inspect", engines).split())
    assert "*.block_sparse_moe.experts.*: int8 per channel" in shown
    assert "quantized: 6 weights int8 per channel" in shown
    output = under_mpi(2, "run", "--engine_dir", engines, "--max_output_len", 4, "--input_text", PROMPT)
    assert output.status == 0, output.err
    assert PROMPT in output.out


def test_int4_on_two_ranks_step_by_step(here: Here, tmp_path: Path) -> None:
    """What ``export`` was told is in its manifest: the steps after it need no option, and can be given another."""
    exported, optimized, engines = (tmp_path / name for name in ("export", "optimize", "engines"))
    done(here, "export", *SMALL, *TP2, *INT4, "--output_dir", exported)
    verified = done(here, "passes", "verify", exported, "--pipeline", "plugins", "--json")
    last = json.loads(verified)[-1]
    assert (last["name"], last["matches"], last["passed"]) == ("quantize-weights", 6, True)
    assert last["before"]["max_abs"] < 1e-4  # of the same numbers
    assert last["hf"]["kl"] > 1e-3  # of others
    done(here, "optimize", "--checkpoint_dir", exported, "--output_dir", optimized, "--pipeline", "plugins")
    assert [rank["ops"]["moecompiler::MoEInt4"] for rank in described(here, optimized)["ranks"]] == [1, 1]
    done(here, "build", "--checkpoint_dir", optimized, "--output_dir", engines)
    report = json.loads(done(here, "validate", engines, "--json", "--tokens", 64, "--no_hf"))
    assert max(each["relative"] for each in report["outputs"]) < 1e-5
    done(here, "optimize", "--checkpoint_dir", exported, "--output_dir", optimized, "--use_weight_only")
    (first, _) = described(here, optimized)["ranks"]
    assert first["quantized"]["schemes"] == {"int8 per channel": 6}


def test_a_recipe(here: Here, tmp_path: Path) -> None:
    """Names decide; another recipe makes other files, the same one none."""
    recipe, engines = tmp_path / "recipe.yaml", tmp_path / "engines"
    recipe.write_text(RECIPE)
    command = ("compile", *SMALL, "--quantization", recipe, "--output_dir", engines)
    done(here, *command)
    (rank,) = described(here, engines)["ranks"]
    assert rank["quantized"]["schemes"] == {"int8 per channel": 4, "uint4 per block 64": 2}
    files = [path for path in engines.rglob("*") if path.is_file() and path.name != "manifest.json"]
    written = {path: path.stat().st_mtime_ns for path in files}
    done(here, *command)
    assert written == {path: path.stat().st_mtime_ns for path in written}
    recipe.write_text(RECIPE.replace("64", "128"))
    done(here, *command)
    touched = {path.name for path, time in written.items() if path.stat().st_mtime_ns != time}
    assert {"rank0.onnx", "rank0.safetensors"} <= touched
    assert (engines / "export" / "rank0.onnx").stat().st_mtime_ns == written[engines / "export" / "rank0.onnx"]
    assert json.loads(done(here, "validate", engines, "--json", "--tokens", 64, "--no_hf"))["passed"]


def test_a_weight_that_no_pass_finds(here: Here, tmp_path: Path) -> None:
    """Is an error, or, where that is allowed, a note, and the engine is validated as it is."""
    engines = tmp_path / "engines"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"rules": [{"match": "*.q_proj", "scheme": "int8"}]}))
    command = ("compile", *SMALL, "--quantization", recipe, "--output_dir", engines, "--pipeline", "plugins")
    refused = here(*command)
    assert refused.status == 2
    assert "pass quantize-weights: did not match in model.layers.0.self_attn" in refused.err
    assert "k_proj and model.layers.0.self_attn.q_proj are one weight here" in refused.err
    assert here(*command, "--allow_missed").status == 0
    (rank,) = described(here, engines)["ranks"]
    assert rank["quantized"] == {"schemes": {}, "kept": [f"model.layers.0.self_attn.{each}_proj" for each in "kqv"]}
    assert json.loads(done(here, "validate", engines, "--json", "--tokens", 64, "--no_hf"))["passed"]


@pytest.mark.parametrize(
    ("options", "rules", "said"),
    [
        (
            ("--tp_size", 4, "--use_weight_only", "--weight_only_precision", "int4"),
            None,
            "--use_weight_only: model.layers.0.self_attn.o_proj.weight on each of 4 ranks: groups of 128 do not divide its 64",
        ),
        (("--weight_only_precision", "int4"), None, "--weight_only_precision int4: goes with --use_weight_only"),
        (("--use_weight_only", "--group_size", 64), None, "scheme 'int8' has no group_size"),
        ((*INT4[:-1], 20), None, "group_size is 20; it must be a multiple of 8"),
        ((), "- {match: '*.norm', scheme: int8}", "'*.norm' matches none of the weights that can be quantized"),
        ((), "- {match: '*.experts.0.*', scheme: int8}", "mixed formats across experts"),
        ((), "- {match: '*', scheme: fp8}", "what the head gets is not calibrated"),
        (("--use_weight_only", "--qformat", "fp8"), None, "--use_weight_only and --qformat fp8 exclude each other"),
        (("--scales", "scales.json"), None, "--scales scales.json: goes with --qformat fp8"),
    ],
)
def test_what_cannot_be(here: Here, tmp_path: Path, options: tuple[object, ...], rules: str | None, said: str) -> None:
    """One line, before any work, and nothing is left behind."""
    recipe, engines = tmp_path / "recipe.yaml", tmp_path / "engines"
    given = () if rules is None else ("--quantization", recipe)
    recipe.write_text(f"rules:\n{rules}\n")
    output = here("compile", *SMALL, *options, *given, "--output_dir", engines)
    assert output.status == 2
    (line,) = output.complaints
    assert said in line
    assert not engines.exists()
