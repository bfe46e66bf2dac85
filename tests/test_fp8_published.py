"""Published FP8 checkpoints: their codes and static scales, as they are, in engines that compute what PyTorch does with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fp8 import calibrated
from programs import GRID, MAX_SEQ_LEN, Passage, Programs, Subject, build_and_load, run_ranks, torch_sessions
from published import FP8_KINDS, save_published
from readers import ArrayReader
from safetensors.torch import load_file, save_file

from moecompiler.calibration.files import write_calibration
from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import ExportOptions, load_config
from moecompiler.errors import UserError
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.quantization.as_json import recipe_from_json
from moecompiler.rounded_inputs import round_inputs
from moecompiler.tools.flags import GraphFlags, MappingFlags, QuantizationFlags, SourceFlags
from moecompiler.tools.job import Job, make_job

FLOAT32 = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)


@pytest.mark.parametrize(
    ("kind", "mapping", "pipeline", "op"),
    [
        ("modelopt-fp8", "tp2", "plugins", "MoEFp8"),
        ("compressed-tensors-fp8", "ep2", "ootb", "QuantizeLinear"),
    ],
)
def test_logits(
    programs: Programs, passage: Passage, tmp_path: Path, kind: str, mapping: str, pipeline: str, op: str
) -> None:
    """Two ranks against one rank in PyTorch that rounds what weights get. Few elements are between two codes so exactly that they
    are rounded otherwise."""
    weights = save_published(tmp_path / "model", FP8_KINDS[kind])
    config = load_config(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model", config)
    recipe = recipe_from_json(source.identity()["quantization"])
    assert {scale for _, scale in recipe.input_scales} == {np.float32(0.01)}
    short = replace(passage, decode_steps=2)
    reference = torch_sessions(Subject(config, ArrayReader(weights), None), GRID["one-rank"], FLOAT32)
    unrounded = run_ranks(reference, GRID["one-rank"], short)
    round_inputs(reference[0].module, recipe, "float32")
    expected = run_ranks(reference, GRID["one-rank"], short)
    ranks, steps = GRID[mapping], named_pipelines(recipe)[pipeline]
    made = [run_passes(steps, programs.exported(config, ranks, r, FLOAT32))[0] for r in range(ranks.world_size)]
    assert all(op in {node.op_type for node in program.model.graph.node} for program in made)
    got = run_ranks(build_and_load(made, Subject(config, source, None), tmp_path), ranks, short)
    errors = np.abs(got - expected).max(-1).reshape(-1)
    assert np.quantile(errors, 0.8) < 2e-4
    assert errors.max() < 0.2
    assert np.abs(unrounded - expected).max(-1).min() > 1e-2


def job_of(model: Path, scales: Path | None = None) -> Job:
    flags = QuantizationFlags(scales=scales)
    return make_job(SourceFlags(model_dir=model, num_layers=1), MappingFlags(), GraphFlags(), flags)


def test_dynamic_scales_need_static_ones(shipped: Subject, tmp_path: Path) -> None:
    """Those of a calibration will do; the largest of weights that get the same."""
    save_published(tmp_path / "model", FP8_KINDS["compressed-tensors-fp8-dynamic"])
    with pytest.raises(UserError, match=r"q_proj is FP8, and there is no static scale of its inputs; give --scales"):
        job_of(tmp_path / "model")
    found = replace(calibrated(shipped), header={})
    write_calibration(tmp_path / "scales", found)
    plan = job_of(tmp_path / "model", tmp_path / "scales").quantization
    assert plan is not None
    attention = "model.layers.0.self_attn"
    (scale,) = {plan.input_scale(f"{attention}.{part}_proj") for part in "qkv"}
    assert scale == max(found.input_scale(f"{attention}.{part}_proj") for part in "qkv")
    assert plan.input_scale(f"{attention}.o_proj") == found.input_scale(f"{attention}.o_proj")


def zero(arrays: dict[str, torch.Tensor], name: str) -> None:
    arrays[name] = torch.zeros_like(arrays[name])


def nan(arrays: dict[str, torch.Tensor], name: str) -> None:
    arrays[name] = torch.full_like(arrays[name], torch.nan)


def drop(arrays: dict[str, torch.Tensor], name: str) -> None:
    del arrays[name]


@pytest.mark.parametrize(
    ("change", "said"), [(zero, "are zero or below"), (nan, "are NaN or infinity"), (drop, "has no input_scale")]
)
def test_broken_scales(tmp_path: Path, change: Callable[[dict[str, torch.Tensor], str], None], said: str) -> None:
    save_published(tmp_path, FP8_KINDS["modelopt-fp8"])
    arrays = load_file(tmp_path / "model.safetensors")
    change(arrays, "model.layers.0.block_sparse_moe.experts.3.w2.input_scale")
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"experts\.3\.w2.*{said}"):
        job_of(tmp_path)


def test_scales_of_other_files(shipped: Subject, tmp_path: Path) -> None:
    """Zeros and NaN in scales.json, an expert without statistics, another model's: one line each."""
    save_published(tmp_path / "model", FP8_KINDS["compressed-tensors-fp8-dynamic"])
    whole = calibrated(shipped)
    write_calibration(tmp_path / "scales", replace(whole, header={"model_fingerprint": "of another"}))
    with pytest.raises(UserError, match="is the calibration of another model"):
        job_of(tmp_path / "model", tmp_path / "scales")
    data = json.loads((tmp_path / "scales" / "scales.json").read_text())
    name, path = "model.layers.0.block_sparse_moe.experts.3.w2", tmp_path / "scales.json"
    del data["header"]["model_fingerprint"]
    for amax, said in (
        (-1.0, "negative, NaN or infinite"),
        (float("nan"), "negative, NaN or infinite"),
        (None, "without"),
    ):
        changed = {key: value for key, value in data["input_amax"].items() if key != name}
        path.write_text(json.dumps(data | {"input_amax": changed | ({} if amax is None else {name: amax})}))
        with pytest.raises(UserError, match=rf"{said}.*experts\.3\.w2"):
            job_of(tmp_path / "model", path)
