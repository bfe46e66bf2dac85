"""q, k and v become one product, by reference; on our export and on small graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from programs import GRID, MAX_SEQ_LEN, Passage, Programs, Subject, build_and_load, run_ranks

from moecompiler.config import ExportOptions
from moecompiler.graph import check
from moecompiler.passes.fuse_attention import FuseAttention
from moecompiler.passes.merge_qkv import MergeQKV
from moecompiler.pipeline import apply, run_passes
from moecompiler.weights import Piece, Recipe, joined, materialize

pytestmark = pytest.mark.xdist_group("fuse-export")
FLOAT32 = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)


class Numbers:
    """Source tensors of known content."""

    def read(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        whole = ord(name) * 1000 + np.arange(48, dtype=np.float32).reshape(6, 8)
        return whole[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def test_joined_recipes_are_the_joined_tensors() -> None:
    parts = [Recipe("float32", (8, 6), (Piece(name, (0, 0), (6, 8), (0, 0), (1, 0)),)) for name in "abc"]
    for axis in (0, 1):
        expected = np.concatenate([materialize(part, Numbers()) for part in parts], axis)
        np.testing.assert_array_equal(materialize(joined(parts, axis), Numbers()), expected)


@pytest.mark.parametrize(
    "other", [Recipe("float16", (8, 6)), Recipe("float32", (7, 6)), Recipe("float32", (8, 6), values=(0,) * 48)]
)
def test_what_does_not_fit_is_not_joined(other: Recipe) -> None:
    with pytest.raises(ValueError, match="differ"):
        joined([Recipe("float32", (8, 6)), other], axis=1)


def test_every_attention_reads_one_product(
    shipped: Subject, programs: Programs, passage: Passage, tmp_path: Path
) -> None:
    split = GRID["ep2"]
    plain = [programs.optimized(shipped.config, split, rank, FLOAT32) for rank in range(2)]
    merged = []
    for program in plain:
        after, results = run_passes((FuseAttention(), MergeQKV()), program)
        assert [result.matches for result in results] == [4, 4]
        check(after)
        assert after.weights["model.layers.1.self_attn.qkv_proj.weight.T"].shape == (128, 128 + 32 + 32)
        assert not any("q_proj" in name for name in after.weights)
        merged.append(after)
    logits = []
    for name, variant in (("plain", plain), ("merged", merged)):
        (tmp_path / name).mkdir()
        logits.append(run_ranks(build_and_load(variant, shipped, tmp_path / name), split, passage))
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-5, rtol=0)
    again, result = apply(MergeQKV(), merged[0])
    assert result.matches == 0
    assert again.model.SerializeToString(deterministic=True) == merged[0].model.SerializeToString(deterministic=True)


def test_projections_of_different_tensors_stay(shipped: Subject, programs: Programs) -> None:
    program, _ = apply(FuseAttention(), programs.optimized(shipped.config, GRID["ep2"], 0, FLOAT32))
    for node in program.model.graph.node:
        if "layers.2.self_attn.k_proj" in node.name:
            node.input[0] = "model.embed_tokens/output"
    assert apply(MergeQKV(), program)[1].matches == 3
