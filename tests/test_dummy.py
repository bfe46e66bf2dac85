"""Dummy weights: the same for every cut, statistically sane, and reopened from their identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import save_hf, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompiler import dummy, uniform
from moecompiler.checkpoint import HFCheckpoint, check_unchanged, expected_tensors, open_checkpoint
from moecompiler.config import PRESETS, ModelConfig, parse_config
from moecompiler.dummy import DummyCheckpoint, open_source
from moecompiler.errors import UserError

CONFIG = parse_config(tiny_config(), "tiny")
W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def whole(source: DummyCheckpoint, name: str) -> np.ndarray:
    shape = expected_tensors(source.config)[name]
    return source.read(name, (0,) * len(shape), shape)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(sorted(expected_tensors(CONFIG))), st.sampled_from([7, 64, 1 << 16]))
def test_a_box_is_the_box_of_the_whole(data: st.DataObject, name: str, chunk: int) -> None:
    source = DummyCheckpoint(CONFIG, seed=3, dtype="float32")
    full = whole(source, name)
    start = tuple(data.draw(st.integers(0, size)) for size in full.shape)
    shape = tuple(data.draw(st.integers(0, size - a)) for a, size in zip(start, full.shape, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform, "CHUNK", chunk)
        box = source.read(name, start, shape)
    assert box.shape == shape
    np.testing.assert_array_equal(box, full[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))])


@pytest.mark.parametrize("threads", [2, 5, 64])
def test_threads_make_the_same_numbers(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dummy, "BAND", 16)
    for name, shape in expected_tensors(CONFIG).items():
        one, several = (DummyCheckpoint(CONFIG, 3, "float16", count) for count in (1, threads))
        np.testing.assert_array_equal(whole(several, name), whole(one, name))
        cut = tuple(size - 1 for size in shape)
        start = (1,) * len(shape)
        np.testing.assert_array_equal(several.read(name, start, cut), one.read(name, start, cut))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_statistics(dtype: str) -> None:
    source = DummyCheckpoint(PRESETS["8x7b"], seed=0, dtype=dtype)
    box = source.read(W1, (0, 0), (512, 2048))
    assert str(box.dtype) == dtype == source.dtype(W1)
    values = box.astype(np.float64)
    assert values.std() == pytest.approx(4096**-0.5, rel=5e-3)
    assert abs(values.mean()) < 1e-4
    assert np.abs(np.triu(np.corrcoef(values[:64]), 1)).max() < 0.15  # 7 deviations of noise
    norm = source.read("model.norm.weight", (0,), (4096,)).astype(np.float64)
    assert norm.mean() == pytest.approx(1, abs=0.005)
    assert norm.std() == pytest.approx(0.05, rel=0.05)


def lowbias32(x: int) -> int:
    """As published in C, in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize(("name", "center", "deviation"), [(W1, 0, 32**-0.5), ("model.norm.weight", 1, 0.05)])
def test_elements_are_hashes(name: str, center: float, deviation: float) -> None:
    """Every element by itself, slowly. A change here changes every dummy engine there is."""
    found = whole(DummyCheckpoint(CONFIG, seed=7, dtype="float32"), name).reshape(-1, 32)
    key = int.from_bytes(hashlib.sha256(f"7 {name}".encode()).digest()[:4], "little")
    hashes = np.array([[lowbias32(lowbias32(row ^ key) ^ column) for column in range(32)] for row in range(len(found))])
    signed = hashes.astype(np.uint32).view(np.int32) / 2**31
    np.testing.assert_allclose(found, center + signed * deviation * 3**0.5, rtol=1e-6, atol=1e-8)


def test_seeds_names_and_rows_differ() -> None:
    source = DummyCheckpoint(CONFIG, seed=0)
    other = W1.replace("experts.0", "experts.1")
    assert not np.array_equal(whole(source, W1), whole(DummyCheckpoint(CONFIG, seed=1), W1))
    assert not np.array_equal(whole(source, W1), whole(source, other))
    assert len(np.unique(whole(source, W1), axis=0)) == CONFIG.intermediate_size


def test_narrower_dtypes_are_the_rounded_ones() -> None:
    wide = whole(DummyCheckpoint(CONFIG, dtype="float32"), W1)
    half = whole(DummyCheckpoint(CONFIG, dtype="float16"), W1)
    np.testing.assert_array_equal(half, wide.astype(np.float16))


def test_a_tied_head_is_the_embedding() -> None:
    source = DummyCheckpoint(replace(CONFIG, tie_word_embeddings=True))
    head = source.read("lm_head.weight", (3, 0), (5, 8))
    np.testing.assert_array_equal(head, source.read("model.embed_tokens.weight", (3, 0), (5, 8)))
    untied = DummyCheckpoint(CONFIG)
    assert not np.array_equal(head, untied.read("lm_head.weight", (3, 0), (5, 8)))


def test_activations_keep_their_size() -> None:
    """In HF's own model with dummy weights, 16 layers deep: residuals grow like the root of the depth, logits spread."""
    config = parse_config(tiny_config(num_hidden_layers=16, hidden_size=64, intermediate_size=224), "deep")
    source = DummyCheckpoint(config, seed=0, dtype="float32")
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**tiny_config(num_hidden_layers=16, hidden_size=64, intermediate_size=224))
        )
    model.to_empty(device="cpu")
    state = {name: torch.from_numpy(whole(source, name)) for name in expected_tensors(config)}
    for layer in range(16):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        w1, w2, w3 = ([state.pop(f"{old}.experts.{e}.{w}.weight") for e in range(8)] for w in ("w1", "w2", "w3"))
        state[f"{new}.gate.weight"] = state.pop(f"{old}.gate.weight")
        state[f"{new}.experts.gate_up_proj"] = torch.cat((torch.stack(w1), torch.stack(w3)), dim=1)
        state[f"{new}.experts.down_proj"] = torch.stack(w2)
    model.load_state_dict(state)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with torch.no_grad():
        out = model(torch.arange(60)[None], output_hidden_states=True)
    sizes = [h.pow(2).mean().sqrt().item() for h in out.hidden_states[1:-1]]
    assert all(0.1 < size < 10 for size in sizes), sizes
    assert 0.5 < out.logits.std().item() < 2


@pytest.mark.parametrize(
    ("start", "shape"), [((0, 0), (49, 32)), ((40, 0), (9, 32)), ((-1, 0), (1, 1)), ((0,), (4,)), ((0, 0), (-1, 2))]
)
def test_boxes_beyond_the_tensor(start: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"w1.weight \(48, 32\) has no box"):
        DummyCheckpoint(CONFIG).read(W1, start, shape)


def test_unknown_dtype() -> None:
    with pytest.raises(UserError, match="dummy weights of dtype 'int8': it must be one of float16, bfloat16, float32"):
        DummyCheckpoint(CONFIG, dtype="int8")


def test_reopening_dummy() -> None:
    source = DummyCheckpoint(CONFIG, seed=5, dtype="float16")
    identity = json.loads(json.dumps(source.identity()))
    assert (identity["kind"], identity["seed"]) == ("dummy", 5)
    again = open_source(identity, CONFIG.with_layers(2))
    assert (again.dtype(W1), again.files) == ("float16", ())
    np.testing.assert_array_equal(again.read(W1, (1, 2), (3, 4)), source.read(W1, (1, 2), (3, 4)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, hidden_size=64), r"model.embed_tokens.weight is \(64, 32\), expected \(64, 64\)"),
        (replace(CONFIG, num_hidden_layers=5), r"model.layers.4.input_layernorm.weight is None, expected \(32,\)"),
    ],
)
def test_reopening_dummy_for_another_model(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=f"the dummy checkpoint is of another model: {message}"):
        open_source(DummyCheckpoint(CONFIG).identity(), config)


def test_reopening_hf(tmp_path: Path) -> None:
    source = open_checkpoint(save_hf(tmp_path), CONFIG)
    identity = json.loads(json.dumps(source.identity()))
    again = open_source(identity, CONFIG)
    assert isinstance(again, HFCheckpoint)
    np.testing.assert_array_equal(again.read(W1, (1, 2), (3, 4)), source.read(W1, (1, 2), (3, 4)))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        UserError, match=r"files changed since they were first read \(1\): model.safetensors; start over"
    ):
        open_source(identity, CONFIG)


def test_identity_survives_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_hf(tmp_path / "saved")
    monkeypatch.chdir(directory.parent)
    identity = open_checkpoint(Path(directory.name), CONFIG).identity()
    assert identity == json.loads(json.dumps(identity))
    assert (identity["kind"], identity["model_dir"]) == ("hf", str(directory))
    monkeypatch.chdir("/")
    check_unchanged(identity)


def test_changes_are_noticed(tmp_path: Path) -> None:
    save_hf(tmp_path, max_shard_size="100KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    identity = open_checkpoint(tmp_path, CONFIG).identity()
    first.touch()
    with pytest.raises(UserError, match=rf"files changed since they were first read \(1\): {first.name}; start over"):
        check_unchanged(identity)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(rope_theta=1.0)))
    with pytest.raises(UserError, match=rf"\(2\): {first.name}, config.json; start over"):
        check_unchanged(identity)
    second.unlink()
    with pytest.raises(UserError, match=f"{second.name}: cannot be read: No such file"):
        check_unchanged(identity)
