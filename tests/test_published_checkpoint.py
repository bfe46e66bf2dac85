"""Published quantized checkpoints as sources of weights: numbers and codes of any box, and what is read for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from published import FP8_KINDS, GROUP, KINDS, Arrays, save_published
from safetensors.numpy import load_file, save_file

from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import load_config
from moecompiler.dummy import check_unchanged
from moecompiler.errors import UserError
from moecompiler.published_checkpoint import QuantizedCheckpoint
from moecompiler.quantization.arithmetic import dequantize

Q, W1, NORM = (
    f"model.layers.0.{each}.weight" for each in ("self_attn.q_proj", "block_sparse_moe.experts.5.w1", "input_layernorm")
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Arrays]]:
    """A checkpoint of a kind, not to be written to, and its weights."""
    made: dict[str, tuple[Path, Arrays]] = {}

    def save(kind: str) -> tuple[Path, Arrays]:
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            made[kind] = directory, save_published(directory, (KINDS | FP8_KINDS)[kind])
        return made[kind]

    return save


def opened(directory: Path, **options: bool) -> QuantizedCheckpoint:
    source = open_checkpoint(directory, load_config(directory), **options)
    assert isinstance(source, QuantizedCheckpoint)
    return source


@pytest.mark.parametrize("kind", KINDS | FP8_KINDS)
def test_numbers_of_boxes(saved: Callable[[str], tuple[Path, Arrays]], kind: str) -> None:
    """Of whole weights, and of boxes that begin inside words and groups."""
    directory, weights = saved(kind)
    source = opened(directory, check_finite=True)
    for name, weight in weights.items():
        np.testing.assert_array_equal(source.read(name, (0,) * weight.ndim, weight.shape), weight, err_msg=name)
    for (row, column), (rows, columns) in (((3, 0), (9, 128)), ((16, GROUP), (8, GROUP)), ((101, 5), (1, 70))):
        box = weights[W1][row : row + rows, column : column + columns]
        np.testing.assert_array_equal(source.read(W1, (row, column), (rows, columns)), box)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_boxes(saved: Callable[[str], tuple[Path, Arrays]], kind: str) -> None:
    directory, weights = saved(kind)
    source = opened(directory)
    scheme = source.scheme(W1)
    assert scheme is not None
    assert (scheme.act_order, source.scheme(NORM)) == (KINDS[kind].act_order, None)
    start, size = ((3, 0), (9, 128)) if scheme.act_order else ((3, GROUP), (9, GROUP))
    part = source.read_codes(W1, start, size)
    assert part.scales.shape == scheme.scale_shape(size)
    exact = weights[W1][tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))].astype(np.float16)
    np.testing.assert_array_equal(dequantize(part, "float16"), exact)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("compressed-tensors", "input features 8 to 40 are no whole groups of 64"), ("gptq-act-order", "with act-order")],
)
def test_codes_are_not_cut_through_groups(saved: Callable[[str], tuple[Path, Arrays]], kind: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        opened(saved(kind)[0]).read_codes(W1, (0, 8), (8, 32))


def test_what_the_identity_says(saved: Callable[[str], tuple[Path, Arrays]], tmp_path: Path) -> None:
    identity = opened(saved("awq")[0]).identity()
    assert identity["quantization"]["format"] == "W4A16 (awq)"
    assert [rule["match"] for rule in identity["quantization"]["rules"]] == [
        "*.self_attn.?_proj",
        "*.block_sparse_moe.experts.*",
    ]
    save_published(tmp_path, KINDS["awq"], plain=("self_attn",))
    source = opened(tmp_path)
    kept, *_ = source.identity()["quantization"]["rules"]
    assert kept == {"match": "model.layers.0.self_attn.q_proj", "scheme": None}
    assert (source.scheme(Q), source.dtype(Q), source.dtype(W1)) == (None, "float32", "float32")
    config = tmp_path / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match=r"files changed since they were first read \(1\): config.json"):
        check_unchanged(source.identity())


def test_modelopts_file_is_part_of_the_identity(tmp_path: Path) -> None:
    save_published(tmp_path, KINDS["awq"])
    identity = opened(tmp_path).identity()
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UserError, match="files changed"):
        check_unchanged(identity)


def test_packed_tensors_are_read_by_box(tmp_path: Path) -> None:
    """Of a rank's eighth of a weight, what the other seven are does not matter."""
    weights = save_published(tmp_path, KINDS["awq"])
    scales = load_file(tmp_path / "model.safetensors")[W1.replace("weight", "scales")]
    scales[:, 32:] = np.nan
    change(tmp_path, scales=scales)
    source = opened(tmp_path)
    np.testing.assert_array_equal(source.read(W1, (0, 0), (32, 128)), weights[W1][:32])
    with pytest.raises(UserError, match=r"scales: .* are NaN or infinity"):
        source.read(W1, (0, 0), (33, 128))


def change(directory: Path, **arrays: np.ndarray | None) -> None:
    """Tensors of expert 5's w1 replaced, or taken out."""
    path, linear = directory / "model.safetensors", W1.removesuffix(".weight")
    tensors = load_file(path)
    for suffix, array in arrays.items():
        tensors.pop(f"{linear}.{suffix}", None)
        if array is not None:
            tensors[f"{linear}.{suffix}"] = array
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"qzeros": None}, "says awq, but model.layers.0.block_sparse_moe.experts.5.w1 has no qzeros; download"),
        (
            {"qweight": None, "qzeros": None, "scales": None, "weight": np.zeros((256, 128), np.float16)},
            "mixed formats across experts: model.layers.0.block_sparse_moe.experts.5.w1 not quantized",
        ),
        ({"qweight": np.zeros((128, 16), np.int32)}, "experts.5.w1.qweight is [128, 16], expected [128, 32]"),
        ({"scales": np.zeros((2, 256), np.int32)}, "experts.5.w1.scales is int32, expected float16, bfloat16, float32"),
        (
            {"g_idx": np.zeros(128, np.int32)},
            "tensors unexpected (1): model.layers.0.block_sparse_moe.experts.5.w1.g_idx",
        ),
        ({"bias": np.ones(256, np.float16)}, "biases, which Mixtral's linear layers have none of (1)"),
        ({"scales": np.zeros((2, 256), np.float16)}, "experts.5.w1: its scales: 512 of 512 are zero or below"),
        ({"scales": np.full((2, 256), np.nan, np.float16)}, "its scales: 512 of 512 are NaN or infinity"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, arrays: dict[str, np.ndarray | None], said: str) -> None:
    save_published(tmp_path, KINDS["awq"])
    change(tmp_path, **arrays)
    with pytest.raises(UserError) as caught:
        opened(tmp_path, check_finite=True)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; supported are awq, gptq"),
        ({"group_size": 48}, "self_attn.q_proj: groups of 48 do not divide its 128 input features"),
        ({"group_size": 32}, "self_attn.q_proj.qzeros is [2, 32], expected [4, 32]"),
        ({"bits": 8}, "bits is 8; weights of 4 bits are supported"),
    ],
)
def test_a_configuration_that_does_not_fit(
    saved: Callable[[str], tuple[Path, Arrays]], tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    directory, _ = saved("awq")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    assert said in str(caught.value)
