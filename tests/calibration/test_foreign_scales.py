"""Scales that ModelOpt, compressed-tensors and TensorRT-LLM calibrated come out as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_config
from safetensors.numpy import save_file

from moecompiler.calibration.foreign import read_scales
from moecompiler.config import parse_config
from moecompiler.errors import UserError
from moecompiler.quantization.published import linear_stacks

CONFIG = parse_config(tiny_config(), "test")
LINEARS = [name for stack in linear_stacks(CONFIG) for name in stack]
MODELOPT = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}


def odd(index: int) -> np.ndarray:
    """A scale whose digits no rounding leaves as they are."""
    return np.array(0.0123456789 * (1 + index / 7), np.float32)


def modelopt(folder: Path, config: dict[str, object] = MODELOPT, **changed: np.ndarray | None) -> dict[str, np.ndarray]:
    scales = {f"{name}.input_scale": odd(i) for i, name in enumerate(LINEARS)}
    for layer in range(CONFIG.num_hidden_layers):
        for i, kind in enumerate("kv"):
            scales[f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"] = odd(1000 + 2 * layer + i)
    scales |= {name: array for name, array in changed.items() if array is not None}
    for name in (name for name, array in changed.items() if array is None):
        del scales[name]
    half = len(scales) // 2
    for number, part in enumerate((list(scales)[:half], list(scales)[half:])):  # checkpoints come in several files
        save_file({name: scales[name] for name in part}, folder / f"model-0000{number}.safetensors")
    (folder / "hf_quant_config.json").write_text(json.dumps(config))
    return scales


def test_modelopt(tmp_path: Path) -> None:
    scales = modelopt(tmp_path)
    found = read_scales(tmp_path, CONFIG)
    for name in LINEARS:
        assert found.input_scale(name) == scales[f"{name}.input_scale"]
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn"
        assert found.cache_scales(name) == (scales[f"{name}.k_proj.k_scale"], scales[f"{name}.v_proj.v_scale"])
    with pytest.raises(UserError, match="has no means by channel of"):
        found.channel_means(LINEARS[0])


def test_scales_of_nvfp4_are_of_two_levels(tmp_path: Path) -> None:
    scales = modelopt(tmp_path, {"quantization": {"quant_algo": "NVFP4", "group_size": 16}})
    found = read_scales(tmp_path, CONFIG)
    assert found.input_scale(LINEARS[5], 6 * 448) == scales[f"{LINEARS[5]}.input_scale"]


@pytest.mark.parametrize(("cache", "largest"), [("FP8", 448), ("INT8", 127)])
def test_tensorrt_llm(tmp_path: Path, cache: str, largest: int) -> None:
    """Two stages of two ranks, which split four layers."""
    modules = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
    ranks = []
    for rank in range(4):
        tensors = {"transformer.vocab_embedding.weight": np.zeros((2, 2), np.float16)}
        for layer in range(2):
            prefix = f"transformer.layers.{layer}"
            for i, module in enumerate(modules):
                tensors[f"{prefix}.{module}.activation_scaling_factor"] = odd(100 * rank + 10 * layer + i).reshape(1)
            tensors[f"{prefix}.attention.kv_cache_scaling_factor"] = odd(100 * rank + 10 * layer + 9).reshape(1)
        save_file(tensors, tmp_path / f"rank{rank}.safetensors")
        ranks.append(tensors)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": cache}
    mapping = {"world_size": 4, "tp_size": 2, "pp_size": 2}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": quantization, "mapping": mapping}))

    found = read_scales(tmp_path, CONFIG)
    larger = ranks[3]  # of the second stage's two
    qkv = larger["transformer.layers.1.attention.qkv.activation_scaling_factor"][0]
    assert [found.input_scale(f"model.layers.3.self_attn.{part}_proj") for part in "qkv"] == [qkv] * 3
    fc = ranks[1]["transformer.layers.0.mlp.fc.activation_scaling_factor"][0]
    assert found.input_scale("model.layers.0.block_sparse_moe.experts.7.w3") == fc
    proj = larger["transformer.layers.0.mlp.proj.activation_scaling_factor"][0]
    assert found.input_scale("model.layers.2.block_sparse_moe.experts.0.w2") == proj
    kv = larger["transformer.layers.1.attention.kv_cache_scaling_factor"][0]
    assert found.cache_scales("model.layers.3.self_attn", largest) == (kv, kv)


UNREACHED = "model.layers.1.block_sparse_moe.experts.3.w2"


@pytest.mark.parametrize(
    ("name", "scale", "said"),
    [
        (f"{UNREACHED}.input_scale", None, rf"experts without statistics \(1 of 112 linear layers\): {UNREACHED}"),
        (f"{UNREACHED}.input_scale", np.float32(0), "is 0.0; a scale must be positive and finite"),
        (f"{UNREACHED}.input_scale", np.float32("nan"), "is nan; a scale must be positive and finite"),
        (f"{UNREACHED}.input_scale", np.ones(4, np.float32), r"is \[4\]; one static scale is expected"),
    ],
)
def test_no_scale_is_made_up(tmp_path: Path, name: str, scale: np.ndarray | None, said: str) -> None:
    modelopt(tmp_path, **{name: None if scale is None else np.asarray(scale)})
    with pytest.raises(UserError, match=said):
        read_scales(tmp_path, CONFIG)


def test_folders_without_scales(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no scales"):
        read_scales(tmp_path, CONFIG)
    with pytest.raises(UserError, match="not found"):
        read_scales(tmp_path / "nowhere", CONFIG)
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    with pytest.raises(UserError, match=r"is quantized \(modelopt\) and has no static scales of activations"):
        read_scales(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {}}))
    with pytest.raises(UserError, match=r"holds no rank0\.safetensors"):
        read_scales(tmp_path, CONFIG)
