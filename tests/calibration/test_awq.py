"""AWQ: what quantizing does is tried out as it is done; scaled weights are the same function, and lose less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from programs import GRID, TINY_MIXTRAL, Programs, Subject
from readers import ArrayReader

from moecompiler.backends.onnxruntime_program import WeightCache
from moecompiler.calibration.awq import search
from moecompiler.calibration.samples import cut_samples
from moecompiler.calibration.streaming import Settings
from moecompiler.calibration.text import default_documents
from moecompiler.calibration.trial import CLIPS, clips, rounded, scales_of
from moecompiler.checkpoint import open_checkpoint
from moecompiler.clipping import clipped
from moecompiler.config import ExportOptions
from moecompiler.dummy import DummyCheckpoint, open_source
from moecompiler.errors import UserError
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.quantization.arithmetic import dequantize, encode, quantize
from moecompiler.quantization.recipe import QuantizationRecipe, Rule, default_recipe
from moecompiler.quantization.scales import find_scales
from moecompiler.quantization.schemes import INT8, NVFP4, WeightScheme, int4
from moecompiler.quantizing import quantize_boxes
from moecompiler.runtime.prompts import load_tokenizer
from moecompiler.smoothed_checkpoint import (
    SmoothedCheckpoint,
    Smoothing,
    open_smoothed,
    read_smoothing,
    write_smoothing,
)
from moecompiler.tools.bench_quantized import logits_of, perplexity, read_text
from moecompiler.validation.difference import log_softmax
from moecompiler.weights import whole

SCHEMES = pytest.mark.parametrize("scheme", [int4(16), int4(16, symmetric=False)], ids=str)
LAYER = "model.layers.0"


@SCHEMES
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_tried_out_is_what_is_done(scheme: WeightScheme, dtype: str) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(dtype)
    weight[3, :16] = 0
    wide, kind = torch.from_numpy(weight.astype(np.float32)), getattr(torch, dtype)
    expected = dequantize(quantize(weight, scheme, dtype), "float32")
    np.testing.assert_array_equal(rounded(wide, scheme, kind).numpy(), expected)
    ratios = np.full((8, 4), 0.75, np.float32)
    less = encode(weight, scheme, clipped(find_scales(weight, scheme, dtype), ratios, dtype))
    got = rounded(wide, scheme, kind, 0.75).numpy()
    np.testing.assert_array_equal(got, dequantize(less, "float32"))
    assert np.abs(got).max() < np.abs(expected).max()


@SCHEMES
def test_the_best_clips(scheme: WeightScheme) -> None:
    """Group by group the least error of all that are tried, by brute force; a far outlier that meets nothing is clipped."""
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 32, generator=rng), torch.randn(40, 32, generator=rng)
    weight[1, 3], x[:, 3] = 12, 0
    best = clips(x, weight, scheme, torch.float32)
    assert (best.dtype, best.shape) == (torch.uint8, (4, 2))
    assert best[1, 0] < 100
    for group in range(2):
        part = slice(group * 16, group * 16 + 16)
        tried = [rounded(weight, scheme, torch.float32, clip / 100)[:, part] - weight[:, part] for clip in CLIPS]
        errors = torch.stack([(x[:, part] @ each.T).square().sum(0) for each in tried])
        found = errors.gather(0, torch.tensor([[CLIPS.index(int(c)) for c in best[:, group]]]))
        torch.testing.assert_close(found[0], errors.amin(0))


def test_scales_are_powers_of_means() -> None:
    mean = torch.tensor([1.0, 4.0, 16.0])
    torch.testing.assert_close(scales_of(mean, 10), torch.tensor([0.5, 1.0, 2.0]))
    assert torch.equal(scales_of(mean, 0), torch.ones(3))
    assert torch.isfinite(scales_of(torch.zeros(3), 19)).all()


def samples_of(subject: Subject) -> list[list[int]]:
    tokenizer = load_tokenizer(TINY_MIXTRAL, subject.config.vocab_size)
    return cut_samples(default_documents(), tokenizer.encode, 64, 256)


def test_awq_is_better_than_plain_int4(shipped: Subject, programs: Programs, tmp_path: Path) -> None:
    """The trained model's perplexity on held-out text, in groups of 64; without codes, scaled weights are the same function."""
    source = open_checkpoint(TINY_MIXTRAL, shipped.config)
    plan = default_recipe(int4(64))
    header = {"cache_key": "x"}
    found = search(shipped.config, source, samples_of(shipped), Settings("float32"), plan, tmp_path, header)
    write_smoothing(tmp_path / "awq.safetensors", found)
    smoothed = open_smoothed(source, tmp_path / "awq.safetensors")
    assert set(found.clips) == {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(4)
        for name in (
            *("self_attn.v_proj", "self_attn.o_proj"),
            *(f"block_sparse_moe.experts.{e}.{w}" for e in range(8) for w in ("w1", "w2", "w3")),
        )
    }
    assert len(np.unique(np.concatenate([each.reshape(-1) for each in found.clips.values()]))) > 3
    tokens = read_text(TINY_MIXTRAL, TINY_MIXTRAL / "heldout.txt", shipped.config.vocab_size, 16, 256)
    options = ExportOptions("float32", max_seq_len=256, all_logits=True)
    exported = programs.exported(shipped.config, GRID["one-rank"], 0, options)
    quantized, _ = run_passes(named_pipelines(plan)["plugins"], exported)
    floats, same = (log_softmax(logits_of(exported, WeightCache(reader), tokens[:2])) for reader in (source, smoothed))
    np.testing.assert_allclose(same, floats, atol=2e-3, rtol=0)
    plain, awq = (log_softmax(logits_of(quantized, WeightCache(reader), tokens)) for reader in (source, smoothed))
    assert perplexity(awq, tokens) < 0.999 * perplexity(plain, tokens)
    awq_kl, plain_kl = ((np.exp(floats) * (floats - each[:2])).sum(-1).mean() for each in (awq, plain))
    assert awq_kl < 0.8 * plain_kl, (awq_kl, plain_kl)
    again = open_source(smoothed.identity(), shipped.config)
    name = f"{LAYER}.self_attn.q_proj.weight"
    np.testing.assert_array_equal(again.read(name, (3, 5), (7, 9)), smoothed.read(name, (0, 0), (128, 128))[3:10, 5:14])
    with pytest.raises(UserError, match=r"was searched for groups of 64, and .* is to have groups of 32"):
        quantize_boxes(whole(f"{LAYER}.self_attn.v_proj.weight", "float32", (64, 128)), int4(32), smoothed)
    (tmp_path / "awq.safetensors").write_bytes((tmp_path / "awq.safetensors").read_bytes() + b" ")
    with pytest.raises(UserError, match=r"awq.safetensors: changed since it was first read"):
        open_source(smoothed.identity(), shipped.config)


def test_threads_and_files_have_no_say(shipped: Subject, tmp_path: Path) -> None:
    """The same bits with one thread and with three, in memory and in files; weights that are no integers in groups are left
    out, and values take scales in where there are as many heads for them."""
    config = shipped.config.with_layers(1)
    samples = [[token % 97 for token in range(at, at + 30)] for at in range(5)]
    plan = QuantizationRecipe(
        (Rule("*.w2", INT8), Rule("*.k_proj", NVFP4), Rule("*.q_proj", None), *default_recipe(int4(64)).rules)
    )
    results = [
        search(config, DummyCheckpoint(config, 3), samples, settings, plan, tmp_path, {})
        for settings in (
            Settings("bfloat16", threads=1, min_tokens=9),
            Settings("bfloat16", threads=3, min_tokens=9, memory_limit=0),
        )
    ]
    for name in ("rows", "columns", "clips"):
        first, second = (getattr(each, name) for each in results)
        assert first.keys() == second.keys()
        for key in first:
            np.testing.assert_array_equal(first[key], second[key], err_msg=key)
    assert not any(name.endswith((".w2.weight", ".k_proj.weight", ".q_proj.weight")) for name in results[0].clips)
    assert results[0].header["group_sizes"][f"{LAYER}.self_attn.o_proj.weight"] == 64


def test_clips_of_joined_boxes() -> None:
    """Each box's groups are clipped as its tensor's are."""
    weight = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)

    clips_ = np.full((4, 2), 60, np.uint8)
    smoothing = Smoothing({}, {"a": np.full(32, 2, np.float32)}, {"a": clips_}, {"group_sizes": {"a": 16}})
    reader = SmoothedCheckpoint(ArrayReader({"a": weight}), smoothing, Path("awq"), "")  # type: ignore[arg-type]
    made = quantize_boxes(whole("a", "float32", (4, 32)), int4(16), reader)
    largest = np.abs(2 * weight).reshape(4, 2, 16).max(-1)
    np.testing.assert_allclose(made.scales, largest * np.float32(0.6) / 7, rtol=1e-6)
    assert np.abs(made.codes).max() == 8


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "awq.safetensors"
    with pytest.raises(UserError, match=r"awq.safetensors: cannot be read"):
        open_smoothed(DummyCheckpoint, path)  # type: ignore[arg-type]
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"is no result of AWQ's search"):
        read_smoothing(path)
