"""The fusing passes on our own exports: how often they match, that numbers stay, and what a near miss says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from programs import (
    GRID,
    MAX_SEQ_LEN,
    Passage,
    Programs,
    Subject,
    build_and_load,
    random_passage,
    random_subject,
    run_ranks,
)

from moecompiler.config import ExportOptions, NormalizationMode
from moecompiler.errors import UserError
from moecompiler.graph import DOMAIN, Program, check, module_of
from moecompiler.mapping import Mapping
from moecompiler.passes.fuse_add_rms_norm import FuseAddRMSNorm
from moecompiler.passes.fuse_attention import FuseAttention
from moecompiler.passes.fuse_moe import FuseMoE
from moecompiler.passes.fuse_rms_norm import FuseRMSNorm
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.passes.restore import Restore
from moecompiler.pipeline import apply, run_passes

pytestmark = pytest.mark.xdist_group("fuse-export")
FUSE = (FuseRMSNorm(), FuseAttention(), FuseMoE(), FuseAddRMSNorm())
FLOAT32 = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)


def fused_ops(program: Program) -> Counter[str]:
    return Counter(node.op_type for node in program.model.graph.node if node.domain == DOMAIN)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_norm_attention_and_moe_is_found(shipped: Subject, programs: Programs, dtype: str) -> None:
    options = ExportOptions(dtype, max_seq_len=MAX_SEQ_LEN)
    program = programs.optimized(shipped.config, GRID["ep2"], 1, options)
    fused, results = run_passes(FUSE, program)
    assert [result.matches for result in results] == [9, 4, 4, 7]
    assert fused_ops(fused) == {"RMSNorm": 2, "AddRMSNorm": 7, "Attention": 4, "MoE": 4, "AllReduce": 9, "AllGather": 1}
    check(fused)
    moe = next(node for node in fused.model.graph.node if node.op_type == "MoE")
    assert module_of(moe.name) == "model.layers.0.mlp"
    gate_up = fused.weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert gate_up.shape == (
        4,
        512,
        128,
    )  # [experts, 2F, H], as the checkpoint has it, though folding had transposed it


@pytest.mark.parametrize("mapping", ["one-rank", "ep2-pp2"])
def test_fused_and_restored_programs_compute_the_same(
    shipped: Subject, programs: Programs, passage: Passage, tmp_path: Path, mapping: str
) -> None:
    """Bodies inlined by ONNX Runtime, and bodies put back by ``restore``: the same bits as the plain program."""
    split = GRID[mapping]
    plain = [programs.optimized(shipped.config, split, rank, FLOAT32) for rank in range(split.world_size)]
    fused = [run_passes(FUSE, program)[0] for program in plain]
    restored = [run_passes((Restore(), *named_pipelines()["ootb"]), program)[0] for program in fused]
    assert not any(program.model.functions for program in restored)
    logits = []
    for name, variant in (("plain", plain), ("fused", fused), ("restored", restored)):
        (tmp_path / name).mkdir()
        logits.append(run_ranks(build_and_load(variant, shipped, tmp_path / name), split, passage))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("mode", "top_k"),
    [
        (NormalizationMode.NONE, 2),
        (NormalizationMode.RENORMALIZE, 1),
        (NormalizationMode.SPARSE_MIXER, 1),
        (NormalizationMode.SPARSE_MIXER, 3),
    ],
)
def test_every_way_of_routing_is_found(programs: Programs, tmp_path: Path, mode: NormalizationMode, top_k: int) -> None:
    subject = random_subject(num_hidden_layers=1, num_local_experts=5, num_experts_per_tok=top_k)
    program = programs.optimized(subject.config, Mapping(), 0, ExportOptions("float32", mode, MAX_SEQ_LEN))
    fused, result = apply(FuseMoE(), program)
    assert result.matches == 1
    (node,) = (node for node in fused.model.graph.node if node.op_type == "MoE")
    attributes = {each.name: each.i for each in node.attribute}
    assert attributes == {"top_k": top_k, "normalization_mode": int(mode)}
    passage = random_passage(subject.config.vocab_size, decode_steps=2)
    logits = []
    for name, variant in (("plain", program), ("fused", fused)):
        (tmp_path / name).mkdir()
        logits.append(run_ranks(build_and_load([variant], subject, tmp_path / name), Mapping(), passage))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5, rtol=0)


def test_a_sliding_window_becomes_an_attribute(programs: Programs) -> None:
    subject = random_subject(num_hidden_layers=1, sliding_window=7)
    fused, result = apply(FuseAttention(), programs.optimized(subject.config, Mapping(), 0, FLOAT32))
    assert result.matches == 1
    (node,) = (node for node in fused.model.graph.node if node.op_type == "Attention")
    assert onnx.helper.get_node_attr_value(node, "window") == 7


def _softmax_over_another_axis(nodes: list[gs.Node]) -> None:
    next(node for node in nodes if node.op == "Softmax").attrs["axis"] = 1


def _other_half(nodes: list[gs.Node]) -> None:
    node = next(node for node in nodes if node.op == "Slice")
    node.inputs[1] = gs.Constant("other_start", node.inputs[1].values + 1)


def _heads_left_in_place(nodes: list[gs.Node]) -> None:
    next(node for node in nodes if node.op == "Transpose").attrs["perm"] = [0, 1, 2, 3]


def _strict_mask(nodes: list[gs.Node]) -> None:
    next(node for node in nodes if node.op == "LessOrEqual").op = "Less"


def _slots_from_one(nodes: list[gs.Node]) -> None:
    node = next(node for node in nodes if node.op == "LessOrEqual")
    node.inputs[0] = gs.Constant("slots_from_one", node.inputs[0].values + 1)


def _cache_of_another_axis(nodes: list[gs.Node]) -> None:
    next(node for node in nodes if node.op == "ScatterElements").attrs["axis"] = 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_softmax_over_another_axis, "works along axis 1, not -1"),
        (_other_half, "of the last"),
        (_heads_left_in_place, "permutes axes [0, 1, 2, 3]"),
        (_strict_mask, "not a causal one: Less where"),
        (_slots_from_one, "does not number the cache's"),
        (_cache_of_another_axis, "works along axis 1, not 2"),
    ],
)
def test_attention_that_is_almost_one_stays(
    shipped: Subject, programs: Programs, change: Callable[[list[gs.Node]], None], reason: str
) -> None:
    program = programs.optimized(shipped.config, GRID["ep2"], 0, FLOAT32)
    broken = _with_change(program, "model.layers.2.self_attn", change)
    after, result = apply(FuseAttention(), broken)
    assert result.matches == 3
    (missed,) = result.missed
    assert missed.module == "model.layers.2.self_attn"
    assert reason in missed.reason
    assert missed.depth > 3
    assert fused_ops(after)["Attention"] == 3


def _another_normalization(nodes: list[gs.Node]) -> None:
    next(node for node in nodes if node.op == "Softmax").op = "LogSoftmax"


def _gate_and_up_overlap(nodes: list[gs.Node]) -> None:
    node = next(node for node in nodes if node.op == "Slice")
    node.inputs[2] = gs.Constant("other_end", node.inputs[2].values - 1)


def _shares_by_token(nodes: list[gs.Node]) -> None:
    next(node for node in nodes if node.op == "Gather").attrs["axis"] = 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_another_normalization, "the routing is none of those known"),
        (_gate_and_up_overlap, "of axis 2, not [0:256] of the last"),
        (_shares_by_token, "its axis is 0, not 1"),
    ],
)
def test_a_moe_that_is_almost_one_stays(
    shipped: Subject, programs: Programs, change: Callable[[list[gs.Node]], None], reason: str
) -> None:
    program = programs.optimized(shipped.config, GRID["ep2"], 0, FLOAT32)
    after, result = apply(FuseMoE(), _with_change(program, "model.layers.1.mlp", change))
    assert result.matches == 3
    (missed,) = result.missed
    assert missed.module.startswith("model.layers.1.mlp")
    assert reason in missed.reason
    assert fused_ops(after)["MoE"] == 3


def test_a_miss_is_an_error_unless_allowed(shipped: Subject, programs: Programs) -> None:
    program = programs.optimized(shipped.config, GRID["ep2"], 0, FLOAT32)
    broken = _with_change(program, "model.layers.2.self_attn", _softmax_over_another_axis)
    with pytest.raises(
        UserError, match=r"fuse-attention: did not match in model\.layers\.2\.self_attn .*--allow_missed"
    ):
        run_passes(FUSE, broken)
    _, results = run_passes(FUSE, broken, allow_missed=True)
    assert [len(result.missed) for result in results] == [0, 1, 0, 0]


def test_twice_changes_nothing_more(shipped: Subject, programs: Programs) -> None:
    once, _ = run_passes(FUSE, programs.optimized(shipped.config, GRID["tp2"], 0, FLOAT32))
    twice, results = run_passes(FUSE, once)
    assert [result.matches for result in results] == [0, 0, 0, 0]
    assert twice.model.SerializeToString(deterministic=True) == once.model.SerializeToString(deterministic=True)


def _with_change(program: Program, module: str, change: Callable[[list[gs.Node]], None]) -> Program:
    """The program with something in one module made different; the shapes noted in it are left as they were."""
    graph = gs.import_onnx(program.model)
    change([node for node in graph.nodes if module_of(node.name).startswith(module)])
    return Program(gs.export_onnx(graph, do_type_check=False), program.weights)
