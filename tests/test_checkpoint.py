"""HF checkpoints: transformers' tensors come out as they went in, only what is asked for is read, and each fault is named."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from checkpoints import (
    Change,
    edit,
    published_weights,
    random_model,
    save_hf,
    save_hollow,
    tiny_config,
    with_tensor,
    without,
)
from safetensors.torch import load_file, save_file

from moecompiler import checkpoint, checkpoint_files
from moecompiler.checkpoint import expected_tensors, open_checkpoint
from moecompiler.config import PRESETS, ModelConfig, load_config, parse_config
from moecompiler.errors import UserError
from moecompiler.safetensors_file import map_tensor

CONFIG = parse_config(tiny_config(), "tiny")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_hf(tmp_path / "saved")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return save_hf(tmp_path / "shards", max_shard_size="100KB")


def fails(directory: Path, message: str, config: ModelConfig = CONFIG, **options: bool) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(directory, config, **options)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", [None, "100KB"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", ["published", "fused"])
def test_all_tensors_of_a_saved_model(
    tmp_path: Path, experts: Any, dtype: str, max_shard_size: str | None, tied: bool
) -> None:
    data = tiny_config(num_hidden_layers=2, tie_word_embeddings=tied)
    save_hf(tmp_path, data, seed=3, dtype=DTYPES[dtype], layout=experts, max_shard_size=max_shard_size)
    model = random_model(data, seed=3, dtype=DTYPES[dtype])
    source = open_checkpoint(tmp_path, load_config(tmp_path), check_finite=True)
    assert (len(source.files) > 1) == (max_shard_size is not None)
    assert all(path.exists() for path in source.files)
    expected = published_weights(model)
    assert expected.keys() == expected_tensors(source.config).keys() | {"lm_head.weight"}
    for name, value in expected.items():
        assert source.dtype(name) == dtype
        found = source.read(name, (0,) * value.ndim, value.shape)
        assert str(found.dtype) == dtype
        np.testing.assert_array_equal(found.astype(np.float32), value)
        start = tuple(size // 3 for size in value.shape)
        box = source.read(name, start, tuple(size // 2 for size in value.shape))
        cut = tuple(slice(size // 3, size // 3 + size // 2) for size in value.shape)
        np.testing.assert_array_equal(box.astype(np.float32), value[cut])


def test_expected_tensors_counts_the_published_parameters() -> None:
    """46.7 and 140.6 billion, as the models' cards say."""
    counts = {name: sum(map(np.prod, expected_tensors(config).values())) for name, config in PRESETS.items()}
    assert counts == {"8x7b": 46_702_792_704, "8x22b": 140_620_634_112}


def test_every_tensor_lies_where_an_onnx_initializer_would_look(saved: Path) -> None:
    source = open_checkpoint(saved, CONFIG)
    raw = (saved / "model.safetensors").read_bytes()
    for name, stored in source.tensors.items():
        assert raw[stored.offset :][: stored.nbytes] == np.ascontiguousarray(map_tensor(stored)).tobytes(), name


def test_only_the_box_is_read(tmp_path: Path) -> None:
    """A model of 20 GB that is a hole in the disk: opened and cut in no time and no memory."""
    config = PRESETS["8x7b"].with_layers(7)
    name = "model.layers.6.block_sparse_moe.experts.7.w2.weight"
    assert save_hollow(tmp_path, config, {name: 14336 * 1000 + 5}) > 20e9
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    source = open_checkpoint(tmp_path, config)
    box = source.read(name, (1000, 0), (4, 14336)).copy()
    column = source.read(name, (990, 5), (20, 1)).copy()
    assert time.perf_counter() - began < 1
    assert process.memory_info().rss - before < 50e6
    assert (np.flatnonzero(box), np.flatnonzero(column)) == ([5], [10])


@pytest.mark.parametrize("experts", ["published", "fused"])
def test_further_layers_are_passed_over(tmp_path: Path, experts: Any) -> None:
    save_hf(tmp_path, layout=experts)
    whole, cut = open_checkpoint(tmp_path, CONFIG), open_checkpoint(tmp_path, CONFIG.with_layers(2))
    assert cut.tensors.items() < whole.tensors.items()
    assert not any("layers.2." in name for name in cut.tensors)
    with pytest.raises(KeyError):
        cut.read("model.layers.2.input_layernorm.weight", (0,), (32,))
    edit(
        tmp_path, with_tensor("model.layers.4.input_layernorm.weight", 32)
    )  # but not those beyond the checkpoint's own
    fails(tmp_path, r"tensors unexpected \(1\): model.layers.4.input_layernorm.weight;", config=CONFIG.with_layers(2))


def test_what_is_no_weight_is_passed_over(saved: Path) -> None:
    edit(saved, with_tensor("model.layers.1.self_attn.rotary_emb.inv_freq", 4))
    assert open_checkpoint(saved, CONFIG).tensors.keys() == expected_tensors(CONFIG).keys()


def test_a_tied_head_is_the_embedding_even_where_it_is_stored(saved: Path) -> None:
    source = open_checkpoint(saved, replace(CONFIG, tie_word_embeddings=True))
    assert source.tensors["lm_head.weight"] == source.tensors["model.embed_tokens.weight"]
    assert "lm_head.weight" not in expected_tensors(source.config)


def test_one_file_of_another_name_and_pickles_beside_it(saved: Path) -> None:
    (saved / "training_args.bin").touch()
    (saved / "model.safetensors").rename(saved / "mixtral.safetensors")
    assert open_checkpoint(saved, CONFIG).files == (saved / "mixtral.safetensors",)


def test_without_a_config_beside_it(saved: Path) -> None:
    (saved / "config.json").unlink()
    assert open_checkpoint(saved, CONFIG.with_layers(4)).identity()["config_sha256"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("model.norm", "1.self_attn.q"),
            r"missing \(2\): \S+1.self_attn.q_proj.weight, model.norm.weight; down",
        ),
        (without("experts"), r"tensors missing \(96\): (model\S+weight,? ){8}and 88 more; download it again, or check"),
        (with_tensor("model.norm.bias", 32), r"tensors unexpected \(1\): model.norm.bias; download"),
        (with_tensor("model.layers.4.mlp.gate.weight", 8, 32), r"unexpected \(1\): model.layers.4.mlp.gate.weight;"),
        (with_tensor("model.norm.weight", 64), r"wrong shape \(1\): model.norm.weight is \[64\], expected \[32\];"),
        (with_tensor("lm_head.weight", 2048), r"wrong shape \(1\): lm_head.weight is \[2048\], expected \[64, 32\];"),
        (
            with_tensor("lm_head.weight", 64, 32, dtype=torch.int8),
            r"wrong dtype \(1\): lm_head.weight is int8, expected",
        ),
        (with_tensor("model.norm.weight", 32, dtype=torch.float64), "float64, expected float16, bfloat16, float32;"),
        (with_tensor("model.norm.weight", 32, dtype=torch.float8_e4m3fn), "is float8_e4m3fn, expected float16,"),
        (with_tensor("model.layers.2.mlp.gate.weight", 8, 32), r"both layouts \(1\): \S+gate.weight and \S+.weight;"),
        (
            with_tensor("model.layers.0.mlp.experts.down_proj", 8, 32, 48),
            r"both layouts \(8\): \S+0.block_sparse_moe.experts.0.w2.weight and \S+0.mlp.experts.down_proj, ",
        ),
        (
            lambda tensors: tensors.update({"norm.weight": tensors.pop("model.norm.weight")}),
            r"missing \(1\): model.norm.weight; tensors unexpected \(1\): norm.weight; download",
        ),
    ],
)
def test_faulty_tensors(saved: Path, change: Change, message: str) -> None:
    fails(edit(saved, change), message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gate_up_proj", r"is \[8, 32, 96\], expected \[8, 96, 32\]"),
        ("down_proj", r"is \[8, 48, 32\], expected \[8, 32"),
    ],
)
def test_fused_experts_the_other_way_round(tmp_path: Path, name: str, message: str) -> None:
    name = f"model.layers.0.mlp.experts.{name}"
    edit(save_hf(tmp_path, layout="fused"), lambda t: t.update({name: t[name].transpose(1, 2).contiguous()}))
    fails(tmp_path, f"{name} {message}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, value: float) -> None:
    monkeypatch.setattr(checkpoint, "FINITE_CHUNK", 100)
    save_hf(tmp_path, tiny_config(num_hidden_layers=1), dtype=DTYPES[dtype])
    edit(tmp_path, lambda t: t["model.layers.0.self_attn.k_proj.weight"].view(-1)[-1].fill_(value))
    config = load_config(tmp_path)
    open_checkpoint(tmp_path, config)
    fails(tmp_path, r"NaN or infinity \(1\): model.layers.0.self_attn.k_proj.weight;", config, check_finite=True)


def test_shard_missing_or_broken(shards: Path) -> None:
    first, second, third, *_ = sorted(shards.glob("model-*.safetensors"))
    third.write_bytes(third.read_bytes()[:-1])
    fails(shards, f"{third.name}: truncated")
    first.unlink()
    second.unlink()
    fails(shards, rf"files missing that the index names \(2\): {first.name}, {second.name}; download it again")


def test_shard_without_a_tensor_of_the_index(shards: Path) -> None:
    index = json.loads((shards / checkpoint_files.INDEX).read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = other
    (shards / checkpoint_files.INDEX).write_text(json.dumps(index))
    fails(shards, rf"tensors that the index puts into a file without them \(1\): model.norm.weight \({other}\);")


def test_tensor_in_two_shards(shards: Path) -> None:
    files = sorted(shards.glob("model-*.safetensors"))
    first, last = load_file(files[0]), load_file(files[-1])
    name = next(iter(first))
    save_file(last | {name: first[name]}, files[-1])
    fails(shards, rf"tensors held twice \(1\): {name} \(in {files[0].name} and {files[-1].name}\);")


def test_shards_without_index(shards: Path) -> None:
    (shards / checkpoint_files.INDEX).unlink()
    fails(shards, "several safetensors files .* without model.safetensors.index.json; download that too")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "index.json: cannot be read as JSON"),
        ("[" * 100_000, "index.json: cannot be read as JSON"),
        ("[]", "index.json: holds list, not a JSON object"),
        ("{}", "index.json: has no weight_map"),
        ('{"weight_map": {}}', "index.json: has no weight_map"),
        ('{"weight_map": {"a": 3}}', "index.json: names the file 3; shards must lie beside the index"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "names the file '../secret.safetensors'"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "names the file '/etc/x.safetensors'"),
    ],
)
def test_broken_index(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / checkpoint_files.INDEX).write_text(content)
    fails(tmp_path, message)


@pytest.mark.parametrize(
    "names", [["pytorch_model.bin"], ["consolidated.00.pth", "consolidated.01.pth"], ["model.pt"], ["last.ckpt"]]
)
def test_pickles(tmp_path: Path, names: list[str]) -> None:
    for name in [*names, "config.json"]:
        (tmp_path / name).write_bytes(b"{}")
    fails(
        tmp_path,
        rf"holds only pickles \({', '.join(names)}\), and unpickling runs whatever code they carry; download the"
        r" safetensors revision, or.* save_pretrained\(directory, safe_serialization=True\)",
    )


def test_no_directory(tmp_path: Path) -> None:
    fails(tmp_path / "gone", "gone: No such file or directory; give the folder of a Hugging Face checkpoint")
    fails(tmp_path, "is empty; give the folder")
    (tmp_path / "file").touch()
    fails(tmp_path / "file", "file: Not a directory; give the folder")
    fails(tmp_path, r"holds no \*.safetensors file; give the folder")


def test_dangling_link(tmp_path: Path) -> None:
    """As in a Hugging Face cache whose blob was deleted."""
    (tmp_path / "model.safetensors").symlink_to("gone")
    fails(tmp_path, "model.safetensors: cannot be read: No such file")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"quantization_config": {"quant_method": "awq"}}', "config.json: quantization_config: has no bits"),
        ('{"quantization_config": "odd"}', "config.json: quantization_config is str, not a JSON object"),
        ("{", "config.json: cannot be read as JSON"),
    ],
)
def test_quantized_or_broken_config(saved: Path, config: str, message: str) -> None:
    (saved / "config.json").write_text(config)
    fails(saved, message)


@pytest.mark.parametrize(("start", "shape"), [((0,), (33,)), ((-1,), (1,)), ((0, 0), (1, 1)), ((30,), (3,))])
def test_boxes_beyond_the_tensor(saved: Path, start: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"model.norm.weight \(32,\) has no box"):
        open_checkpoint(saved, CONFIG).read("model.norm.weight", start, shape)
