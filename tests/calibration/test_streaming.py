"""Statistics are those that transformers' own model shows, whatever the threads and wherever the hidden states lie."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import edit, save_hf, tiny_config
from programs import Subject
from torch.overrides import TorchFunctionMode

from moecompiler.calibration.result import Calibration
from moecompiler.calibration.streaming import Settings, calibrate, least_tokens
from moecompiler.checkpoint import Source, open_checkpoint
from moecompiler.config import ModelConfig, load_config, parse_config
from moecompiler.dummy import DummyCheckpoint
from moecompiler.errors import UserError
from moecompiler.validation.quality import load_hf

FLOAT32 = Settings("float32", threads=2)


def samples_of(vocab_size: int, *lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


class Inputs(TorchFunctionMode):
    """Keeps what every linear layer that transformers calls gets, by where its weight lies; a layer's experts are slices of one
    tensor there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[torch.Tensor]] = {}

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            self.seen.setdefault(args[1].data_ptr(), []).append(args[0].reshape(-1, args[0].shape[-1]))
        return function(*args, **(kwargs or {}))

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.seen[weight.data_ptr()]).abs()


def hf_statistics(
    subject: Subject, samples: Sequence[Sequence[int]]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """By linear layer the magnitudes ``[tokens, in]`` of what it gets, and the largest key and value of each cache."""
    model = load_hf(subject.config, subject.reader.identity(), subject.reader)
    model.set_experts_implementation("eager")
    largest: dict[str, float] = {}
    with torch.inference_mode(), Inputs() as inputs:
        for sample in samples:
            cache = model(torch.tensor([sample]), use_cache=True).past_key_values
            for layer, each in enumerate(cache.layers):
                for kind, tensor in (("keys", each.keys), ("values", each.values)):
                    name = f"{kind} {layer}"
                    largest[name] = max(largest.get(name, 0.0), float(tensor.abs().max()))
    found = {}
    for index, layer in enumerate(model.model.layers):
        prefix, mlp = f"model.layers.{index}", layer.mlp
        for part in "qkvo":
            found[f"{prefix}.self_attn.{part}_proj"] = inputs.of(getattr(layer.self_attn, f"{part}_proj").weight)
        found[f"{prefix}.block_sparse_moe.gate"] = inputs.of(mlp.gate.weight)
        for expert in range(subject.config.num_local_experts):
            name = f"{prefix}.block_sparse_moe.experts.{expert}"
            found[f"{name}.w1"] = found[f"{name}.w3"] = inputs.of(mlp.experts.gate_up_proj[expert])
            found[f"{name}.w2"] = inputs.of(mlp.experts.down_proj[expert])
    return found, largest


def test_the_statistics_are_those_of_transformers(shipped: Subject, tmp_path: Path) -> None:
    samples = samples_of(shipped.config.vocab_size, 96, 1, 160)
    expected, largest = hf_statistics(shipped, samples)
    found = calibrate(shipped.config, shipped.reader, samples, FLOAT32, tmp_path)

    assert found.input_amax.keys() == found.input_mean.keys() == expected.keys()
    for name, magnitudes in expected.items():
        assert found.input_amax[name] == pytest.approx(float(magnitudes.max()), rel=1e-5), name
        np.testing.assert_allclose(found.input_mean[name], magnitudes.mean(0), rtol=1e-5, atol=1e-6, err_msg=name)
    assert {f"keys {layer}" for layer in range(4)} | {f"values {layer}" for layer in range(4)} == largest.keys()
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn"
        assert found.keys[name] == pytest.approx(largest[f"keys {layer}"], rel=1e-5)
        assert found.values[name] == pytest.approx(largest[f"values {layer}"], rel=1e-5)
    assert len(found.experts) == 32
    for name, expert in found.experts.items():
        assert not expert.fed
        assert expert.tokens == len(expected[f"{name}.w1"])
    scale = found.input_scale("model.layers.1.self_attn.q_proj")
    assert scale == np.float32(found.input_amax["model.layers.1.self_attn.q_proj"]) / np.float32(448)


def same(a: Calibration, b: Calibration) -> bool:
    return (
        (a.input_amax, a.keys, a.values, a.experts) == (b.input_amax, b.keys, b.values, b.experts)
        and a.input_mean.keys() == b.input_mean.keys()
        and all(np.array_equal(mean, b.input_mean[name]) for name, mean in a.input_mean.items())
    )


def test_neither_threads_nor_files_change_a_bit(shipped: Subject, tmp_path: Path) -> None:
    config, reader = shipped.config.with_layers(2), shipped.reader
    samples = samples_of(config.vocab_size, 300, 17, 500, 250)
    expected = calibrate(config, reader, samples, replace(FLOAT32, threads=1), tmp_path)
    on_disk = replace(FLOAT32, threads=3, memory_limit=0)
    before = torch.get_num_threads()
    assert same(expected, calibrate(config, reader, samples, on_disk, tmp_path))
    assert torch.get_num_threads() == before
    assert list(tmp_path.iterdir()) == []  # the files have no names
    assert not same(expected, calibrate(config, reader, samples[:3], on_disk, tmp_path))


def starved_model(directory: Path) -> tuple[ModelConfig, Source]:
    """A random model whose first router gives expert 2 the logit 0. Three pairs of others have opposite rows, so that for every
    token three logits are positive."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        rows = tensors["model.layers.0.block_sparse_moe.gate.weight"]
        rows[2] = 0
        for one, other in ((0, 1), (3, 4), (5, 6)):
            rows[other] = -rows[one]

    config = tiny_config(num_hidden_layers=2)
    edit(save_hf(directory, config), change)
    return parse_config(config, "test"), open_checkpoint(directory, load_config(directory))


def test_an_expert_that_gets_nothing_is_fed_everything(tmp_path: Path) -> None:
    """Its statistics come from all tokens, weighted by how close the router was; the model's own numbers stay what they are."""
    config, reader = starved_model(tmp_path / "model")
    samples = samples_of(config.vocab_size, 40, 30)
    found = calibrate(config, reader, samples, FLOAT32, tmp_path)
    moe = "model.layers.0.block_sparse_moe"
    fed = found.experts[f"{moe}.experts.2"]
    assert (fed.tokens, fed.fed) == (0, True)
    assert sum(each.fed for name, each in found.experts.items() if name.startswith(moe)) == 1
    assert sum(each.tokens for name, each in found.experts.items() if name.startswith(moe)) == 2 * 70
    assert found.input_amax[f"{moe}.experts.2.w1"] == found.input_amax[f"{moe}.gate"]
    assert found.input_amax[f"{moe}.experts.2.w2"] > 0
    weighted, plain = found.input_mean[f"{moe}.experts.2.w1"], found.input_mean[f"{moe}.gate"]
    assert np.isfinite(weighted).all()
    assert not np.allclose(weighted, plain)

    all_fed = calibrate(config, reader, samples, replace(FLOAT32, min_tokens=1000), tmp_path)
    assert all(each.fed for each in all_fed.experts.values())
    assert {name: each.tokens for name, each in all_fed.experts.items()} == {
        name: each.tokens for name, each in found.experts.items()
    }
    for layer in range(2):  # the second sees what the first one's experts made of it
        for name in ("self_attn.q_proj", "self_attn.o_proj", "block_sparse_moe.gate"):
            assert (
                all_fed.input_amax[f"model.layers.{layer}.{name}"] == found.input_amax[f"model.layers.{layer}.{name}"]
            )


def test_how_few_tokens_are_too_few() -> None:
    config = load_config("8x7b")  # 2 of 8 experts
    assert least_tokens(400, config, None) == 10
    assert least_tokens(512 * 512, config, None) == 256
    assert least_tokens(3, config, None) == 1
    assert least_tokens(400, config, 77) == 77
    assert least_tokens(400, config, 0) == 1


def test_a_wider_checkpoint_is_rounded_as_engines_round_it(tmp_path: Path) -> None:
    config = parse_config(tiny_config(num_hidden_layers=1), "test")
    samples = samples_of(config.vocab_size, 30)
    wide, narrow = DummyCheckpoint(config, dtype="float32"), DummyCheckpoint(config, dtype="bfloat16")
    expected = calibrate(config, narrow, samples, FLOAT32, tmp_path)
    assert same(calibrate(config, wide, samples, replace(FLOAT32, dtype="bfloat16"), tmp_path), expected)
    assert not same(calibrate(config, wide, samples, FLOAT32, tmp_path), expected)


def test_a_full_disk_is_said_before_anything_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    config = parse_config(tiny_config(num_hidden_layers=1), "test")
    settings = replace(FLOAT32, memory_limit=0)
    with pytest.raises(UserError, match=r"no room for the hidden states of 9 tokens \(No space left on device\)"):
        calibrate(config, DummyCheckpoint(config), samples_of(64, 9), settings, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    folder = save_hf(tmp_path / "model", tiny_config(num_hidden_layers=2))
    edit(folder, lambda tensors: tensors[name].__setitem__((0, 0), float("nan")))
    config = load_config(folder)
    with pytest.raises(UserError, match=r"model\.layers\.1: its activations are NaN or infinite"):
        calibrate(config, open_checkpoint(folder, config), samples_of(64, 8, 9), FLOAT32, tmp_path)
