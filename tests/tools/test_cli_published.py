"""Published quantized checkpoints on the command line: compiled, inspected, validated; what cannot be, in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import Here
from published import FP8_KINDS, KINDS, save_published

from moecompiler.artifact import Artifact
from moecompiler.errors import UserError
from moecompiler.quantization.published import linear_stacks
from moecompiler.tools.flags import GraphFlags, MappingFlags, QuantizationFlags, SourceFlags
from moecompiler.tools.job import make_job

pytestmark = pytest.mark.xdist_group("quantization")
SMALL = ("--dtype", "float32", "--max_seq_len", 128)


def done(here: Here, *arguments: object) -> str:
    output = here(*arguments)
    assert output.status == 0, output.out + output.err
    return output.out


def test_awq_on_two_ranks(here: Here, tmp_path: Path) -> None:
    """Attention split, experts apart, none quantized but by the checkpoint; engines compute what its codes say."""
    model, engines = tmp_path / "Mixtral-AWQ", tmp_path / "engines"
    save_published(model, KINDS["awq"])
    options = (*SMALL, "--tp_size", 2, "--moe_ep_size", 2, "--pipeline", "plugins")
    done(here, "compile", "--model_dir", model, *options, "--output_dir", engines)
    assert Artifact.open(engines).header["source"]["quantization"]["format"] == "W4A16 (awq)"
    data = json.loads(done(here, "inspect", engines, "--json"))
    assert data["checkpoint_format"] == "W4A16 (awq)"
    for rank in data["ranks"]:
        assert rank["quantized"] == {"schemes": {"uint4 per block 64": 4}, "kept": []}
        assert rank["ops"]["moecompiler::MoEInt4Asymmetric"] == 1
    shown = " ".join(done(here, "inspect", engines).split())
    assert "checkpoint W4A16 (awq)" in shown
    assert "quantized: 4 weights uint4 per block 64" in shown
    report = json.loads(done(here, "validate", engines, "--json", "--tokens", 64))
    assert max(each["relative"] for each in report["outputs"]) < 1e-5
    assert max(each["kl"] for each in report["quality"]) < 1e-6  # of HF's model with the same numbers
    (*_, last) = json.loads(done(here, "passes", "verify", engines, "--pipeline", "plugins", "--json"))
    assert (last["name"], last["matches"], last["passed"]) == ("quantize-weights", 6, True)
    assert last["hf"]["kl"] < 1e-6
    other = here(
        "optimize", "--checkpoint_dir", engines / "export", "--output_dir", tmp_path / "o", "--use_weight_only"
    )
    assert other.status == 2
    assert "q_proj is uint4 per block 64 in the checkpoint, and cannot be quantized to int8" in other.err


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("gptq-act-order", ("--tp_size", 2), "quantized with act-order, whose groups cannot be split over --tp_size 2"),
        (
            "awq",
            ("--tp_size", 2, "--moe_tp_size", 2, "--num_layers", 1, "--use_weight_only"),
            "--use_weight_only: model.layers.0.self_attn.q_proj is uint4 per block 64 in the checkpoint",
        ),
        (
            "compressed-tensors",
            ("--tp_size", 8),
            "o_proj.weight on each of 8 ranks: groups of 64 do not divide its 32 input features; use fewer tensor-parallel",
        ),
        (
            "compressed-tensors-fp8-dynamic",
            (),
            "model.layers.0.self_attn.q_proj is FP8, and there is no static scale of its inputs; give --scales",
        ),
    ],
)
def test_what_cannot_be(here: Here, tmp_path: Path, kind: str, options: tuple[object, ...], said: str) -> None:
    save_published(tmp_path / "model", (KINDS | FP8_KINDS)[kind])
    engines = tmp_path / "engines"
    output = here("compile", "--model_dir", tmp_path / "model", *SMALL, *options, "--output_dir", engines)
    assert output.status == 2
    (line,) = output.complaints
    assert said in line
    assert not engines.exists()


@pytest.mark.parametrize("kind", ["gptq-act-order", "compressed-tensors-fp8-dynamic"])
def test_a_recipe_leaves_weights_out(tmp_path: Path, kind: str) -> None:
    """What rules keep is held as the numbers that codes stand for, so neither act-order nor dynamic scales are refused;
    what no rule names stays codes."""
    save_published(tmp_path, (KINDS | FP8_KINDS)[kind])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules: [{match: '*', scheme: none}]")
    job = make_job(
        SourceFlags(model_dir=tmp_path), MappingFlags(tp_size=2), GraphFlags(), QuantizationFlags(quantization=recipe)
    )
    assert job.quantization is not None
    names = [name for stack in linear_stacks(job.model) for name in stack]
    assert {job.quantization.scheme_of(name) for name in names} == {None}
    recipe.write_text("rules: [{match: '*.o_proj', scheme: none}]")
    with pytest.raises(UserError, match=r"act-order|no static scale"):
        make_job(
            SourceFlags(model_dir=tmp_path),
            MappingFlags(tp_size=2),
            GraphFlags(),
            QuantizationFlags(quantization=recipe),
        )
