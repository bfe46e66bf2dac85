"""q, k and v become one product, by reference; on our export and on small graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import program as written
from graphs import whole
from programs import GRID, MAX_SEQ_LEN, Passage, Programs, Subject, build_and_load, run_ranks
from readers import ArrayReader

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
    result = apply(MergeQKV(), program)[1]
    assert result.matches == 3
    (missed,) = result.missed
    assert missed.module == "model.layers.2.self_attn"
    assert "k_proj" in missed.reason
    assert "reads model.embed_tokens/output, not" in missed.reason


BIASED = """g (float[2, 8] x, float[2, 3, 4] cos) => (float[2, 6] y) <int64[3] shape = {1, 2, 6}> {
    ["a.q_proj/Gemm_1"] q = Gemm <transB = 1> (x, wq, bq)
    ["a.k_proj/MatMul_2"] k0 = MatMul (x, wk)
    ["a.k_proj/Add_3"] k = Add (bk, k0)
    ["a.v_proj/Gemm_4"] v = Gemm (x, wv, bv)
    ["a/Reshape_5"] rows = Reshape (q, shape)
    ["a/ContextAttention_6"] y = moecompiler.ContextAttention <num_heads = 2, num_kv_heads = 1, scale = 1.0>
        (rows, k, v, cos, cos, cos) }"""
WEIGHTS = {"wq": whole("wq", 6, 8), "wk": whole("wk", 8, 3), "wv": whole("wv", 8, 3)}
BIASES = {"bq": whole("bq", 6), "bk": whole("bk", 3), "bv": whole("bv", 3)}
ARRAYS = ArrayReader({name: np.random.default_rng(0).random(r.shape) for name, r in {**WEIGHTS, **BIASES}.items()})


def test_biased_projections_of_several_spellings_are_joined_by_reference() -> None:
    after, result = apply(MergeQKV(), written(BIASED, {**WEIGHTS, **BIASES}))
    assert (result.matches, result.missed) == (1, ())
    assert [node.op_type for node in after.model.graph.node] == [
        "MatMul",
        "Add",
        "Split",
        "Reshape",
        "ContextAttention",
    ]
    w, b = ({name: ARRAYS.arrays[name] for name in each} for each in (WEIGHTS, BIASES))
    weight, bias = (materialize(after.weights[f"a.qkv_proj.{name}"], ARRAYS) for name in ("weight.T", "bias"))
    np.testing.assert_allclose(weight, np.concatenate([w["wq"].T, w["wk"], w["wv"]], axis=1), rtol=1e-6)
    np.testing.assert_allclose(bias, np.concatenate([b["bq"], b["bk"], b["bv"]]), rtol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("(x, wq, bq)", "(x, wq)", "only some of its projections have biases"),
        ("(x, wv, bv)", "(x, wk, bv)", "something else reads the weight of a.k_proj/MatMul_2"),
        ("MatMul (x, wk)", "MatMul (cos, wk)", "a.k_proj/MatMul_2 reads cos, not x"),
    ],
)
def test_projections_that_are_almost_alike_stay(old: str, new: str, reason: str) -> None:
    text = BIASED.replace(old, new)
    result = apply(MergeQKV(), written(text, {**WEIGHTS, **BIASES}))[1]
    assert result.matches == 0
    (missed,) = result.missed
    assert (missed.module, missed.node) == ("a", "a/ContextAttention_6")
    assert reason in missed.reason


def test_weights_that_are_held_are_not_expected_to_be_merged() -> None:
    held = ", ".join(f"float[{', '.join(map(str, r.shape))}] {name}" for name, r in {**WEIGHTS, **BIASES}.items())
    text = BIASED.replace("float[2, 8] x,", f"float[2, 8] x, {held},")
    result = apply(MergeQKV(), written(text))[1]
    assert (result.matches, result.missed) == (0, ())
