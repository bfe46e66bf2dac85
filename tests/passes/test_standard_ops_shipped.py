"""ONNX's own operators in whole models: the shipped one, split over ranks, and Hugging Face's export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hf_exports import Kind, exported
from hf_exports import logits as foreign_logits
from programs import (
    GRID,
    MAX_SEQ_LEN,
    Passage,
    Programs,
    Subject,
    build_and_load,
    hf_logits,
    largest_error,
    random_passage,
    random_subject,
    run_ranks,
)

from moecompiler.config import ExportOptions
from moecompiler.graph import DOMAIN, check
from moecompiler.mapping import Mapping
from moecompiler.passes.fuse_add_rms_norm import FuseAddRMSNorm
from moecompiler.passes.fuse_attention import FuseAttention
from moecompiler.passes.fuse_moe import FuseMoE
from moecompiler.passes.fuse_rms_norm import FuseRMSNorm
from moecompiler.passes.pipelines import PLUGINS, named_pipelines
from moecompiler.passes.standard_ops import StandardOps
from moecompiler.pipeline import run_passes

pytestmark = pytest.mark.xdist_group("foreign")
FUSE = (FuseRMSNorm(), FuseAttention(), FuseMoE(), FuseAddRMSNorm())


@pytest.mark.parametrize(
    ("mapping", "dtype", "bound"),
    [
        ("one-rank", "float32", 2e-5),
        ("one-rank", "float16", 0.03),
        ("ep2-pp2", "float32", 2e-5),
        ("ep2-pp2", "bfloat16", 2e-4),
    ],
)
def test_the_shipped_model_says_the_same(
    shipped: Subject, programs: Programs, passage: Passage, tmp_path: Path, mapping: str, dtype: str, bound: float
) -> None:
    """Prefill of a ragged batch and 16 steps, against the fused graph and against transformers in float32."""
    split, options = GRID[mapping], ExportOptions(dtype, max_seq_len=MAX_SEQ_LEN)
    plain = [programs.optimized(shipped.config, split, rank, options) for rank in range(split.world_size)]
    fused = [run_passes(FUSE, program)[0] for program in plain]
    standard = []
    for rank, program in enumerate(fused):
        made, (result,) = run_passes([StandardOps()], program)
        check(made)
        assert result.matches == 12 // split.pp_size + split.is_last_stage(rank)
        standard.append(made)
    logits = []
    for name, variant in (("fused", fused), ("standard", standard)):
        (tmp_path / name).mkdir()
        logits.append(run_ranks(build_and_load(variant, shipped, tmp_path / name), split, passage))
    assert largest_error(logits[1], logits[0]) < bound
    assert largest_error(logits[1], hf_logits(shipped.hf, passage)) < bound


def test_a_sliding_window_says_the_same(programs: Programs, tmp_path: Path) -> None:
    subject = random_subject(num_hidden_layers=1, sliding_window=7)
    plain = programs.optimized(subject.config, Mapping(), 0, ExportOptions("float32", max_seq_len=MAX_SEQ_LEN))
    standard, _ = run_passes((*FUSE, StandardOps()), plain)
    assert "Greater" in {node.op_type for node in standard.model.graph.node}
    logits = []
    passage = random_passage(subject.config.vocab_size, (12, 5, 9))
    for name, variant in (("plain", plain), ("standard", standard)):
        (tmp_path / name).mkdir()
        logits.append(run_ranks(build_and_load([variant], subject, tmp_path / name), Mapping(), passage))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5, rtol=0)


def test_a_pass_that_fuses_afterwards_adds_its_body_at_the_same_opset(shipped: Subject, programs: Programs) -> None:
    options = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)
    plain = programs.optimized(shipped.config, GRID["ep2-pp2"], 0, options)
    made, _ = run_passes((FuseRMSNorm(), FuseAttention(), StandardOps(), FuseMoE()), plain)
    check(made)
    (function,) = made.model.functions
    assert (function.name, function.opset_import[0].version) == ("MoE", 24)


def test_an_export_of_transformers_is_mapped_too() -> None:
    foreign = exported(Kind("llama", attention="eager", layers=2, exporter="traced"))
    fused, _ = run_passes(named_pipelines()[PLUGINS], foreign.program)
    standard, (result,) = run_passes([StandardOps()], fused)
    check(standard)
    assert result.matches == 7
    assert not any(node.domain == DOMAIN for node in standard.model.graph.node)
    before, after = (foreign_logits(program, foreign.reader, (2, 7)) for program in (foreign.program, standard))
    np.testing.assert_allclose(after, before, atol=2e-5, rtol=0)
