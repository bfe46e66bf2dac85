"""Programs of published quantized checkpoints, run on ONNX Runtime: what PyTorch makes of the numbers that codes stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from programs import (
    GRID,
    MAX_SEQ_LEN,
    Passage,
    Programs,
    Subject,
    build_and_load,
    largest_error,
    run_ranks,
    torch_sessions,
)
from published import KINDS, save_published
from readers import ArrayReader

from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import ExportOptions, load_config
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.quantization.as_json import recipe_from_json
from moecompiler.weights import Part

FLOAT32 = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)
CASES = [
    ("awq", "one-rank", "plugins", {"LinearInt4Asymmetric", "MoEInt4Asymmetric"}),
    ("awq", "tp2", "plugins", {"LinearInt4Asymmetric", "MoEInt4Asymmetric"}),
    ("awq", "ep2", "ootb", {"DequantizeLinear"}),
    ("gptq", "tp2", "ootb", {"DequantizeLinear"}),
    ("gptq-act-order", "one-rank", "plugins", {"LinearInt4Ordered", "MoEInt4Ordered"}),
    ("gptq-act-order-asymmetric", "one-rank", "ootb", {"DequantizeLinear", "GatherND"}),
    ("compressed-tensors", "ep2", "plugins", {"LinearInt4", "MoEInt4"}),
    ("modelopt-nvfp4", "tp2", "plugins", {"LinearNvfp4", "MoENvfp4"}),
    ("compressed-tensors-nvfp4", "ep2", "ootb", {"DequantizeLinear", "Gather"}),
    ("compressed-tensors-rows", "tp2", "plugins", {"LinearInt4AsymmetricRows", "MoEInt4AsymmetricRows"}),
]


@pytest.mark.parametrize(("kind", "mapping", "pipeline", "ops"), CASES, ids=["-".join(case[:3]) for case in CASES])
def test_logits(
    programs: Programs, passage: Passage, tmp_path: Path, kind: str, mapping: str, pipeline: str, ops: set[str]
) -> None:
    weights = save_published(tmp_path / "model", KINDS[kind])
    config = load_config(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model", config)
    subject = Subject(config, ArrayReader(weights), None)
    short = replace(passage, decode_steps=2)
    expected = run_ranks(torch_sessions(subject, GRID["one-rank"], FLOAT32), GRID["one-rank"], short)
    recipe = recipe_from_json(source.identity()["quantization"])
    steps, ranks = named_pipelines(recipe)[pipeline], GRID[mapping]
    made = [run_passes(steps, programs.exported(config, ranks, r, FLOAT32))[0] for r in range(ranks.world_size)]
    assert ops <= {node.op_type for program in made for node in program.model.graph.node}
    sessions = build_and_load(made, replace(subject, reader=source), tmp_path)
    assert largest_error(run_ranks(sessions, ranks, short), expected) < 2e-4
    codes = [r for program in made for r in program.weights.values() if r.quantized and r.quantized.part is Part.CODES]
    linear = sum(weight.size for name, weight in weights.items() if "proj" in name or "experts" in name)
    assert sum(recipe.nbytes for recipe in codes) == linear / 2
