"""Configurations: every spelling that transformers writes is read, and whatever cannot be built is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moecompiler.config import PRESETS, ExportOptions, ModelConfig, NormalizationMode, load_config, parse_config
from moecompiler.errors import UserError

CONTENT: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
PARSED = ModelConfig(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=5,
    num_experts_per_tok=3,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=5000.0,
    tie_word_embeddings=True,
    dtype="float16",
)


def parse(**overrides: Any) -> ModelConfig:
    return parse_config(CONTENT | overrides, "config.json")


def parse_without(*keys: str) -> ModelConfig:
    return parse_config({key: value for key, value in CONTENT.items() if key not in keys}, "config.json")


def test_every_key() -> None:
    assert parse() == PARSED


@pytest.mark.parametrize(
    ("overrides", "theta", "factor"),
    [
        ({}, 5000.0, 1.0),
        ({"rope_theta": 10000}, 10000.0, 1.0),
        ({"rope_scaling": None}, 5000.0, 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 5000.0, 4.0),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, 5000.0, 2.0),
        ({"rope_scaling": {"rope_type": "default", "factor": 9.0}}, 5000.0, 1.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, 1.0),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 8.0}}, 7.0, 8.0),
        ({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, 5000.0, 8.0),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 3.0}}, 5000.0, 3.0),
    ],
)
def test_rope(overrides: dict[str, Any], theta: float, factor: float) -> None:
    """Both spellings; a factor counts only for linear scaling."""
    config = parse(**overrides)
    assert (config.rope_theta, config.rope_scaling_factor) == (theta, factor)


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ({"head_dim": 32}, {"head_dim": 32}),
        ({"head_dim": None}, {"head_dim": 8}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 6}),
        ({"eos_token_id": [2, 7]}, {"eos_token_ids": (2, 7)}),
        ({"eos_token_id": None}, {"eos_token_ids": ()}),
        ({"bos_token_id": None}, {"bos_token_id": None}),
        ({"eos_token_id": 0, "bos_token_id": 0}, {"eos_token_ids": (0,), "bos_token_id": 0}),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": None, "torch_dtype": None}, {"dtype": "float32"}),
        ({"sliding_window": 4096}, {"sliding_window": 4096}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ({"rms_norm_eps": None}, {"rms_norm_eps": 1e-5}),
    ],
)
def test_variants(overrides: dict[str, Any], changes: dict[str, Any]) -> None:
    assert parse(**overrides) == replace(PARSED, **changes)


def test_absent_keys_mean_what_they_mean_to_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    optional = {
        "num_local_experts",
        "num_experts_per_tok",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "hidden_act",
        "bos_token_id",
        "eos_token_id",
        "torch_dtype",
    }
    given = {key: value for key, value in CONTENT.items() if key not in optional}
    assert parse_without(*optional) == parse_config(transformers.MixtralConfig(**given).to_dict(), "transformers")


def test_absent_key_value_heads_are_eight() -> None:
    """As in ``transformers.MixtralConfig``; null means as many as attention heads."""
    content = {key: value for key, value in CONTENT.items() if key != "num_key_value_heads"}
    assert parse_config(content | {"num_attention_heads": 16, "hidden_size": 64}, "here").num_key_value_heads == 8


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"sliding_window": 128, "tie_word_embeddings": True},
        {"head_dim": 64, "num_key_value_heads": 1},
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}},
        {"eos_token_id": [1, 2], "bos_token_id": None, "dtype": "float16"},
        {"num_local_experts": 5, "num_experts_per_tok": 3, "num_hidden_layers": 7, "rms_norm_eps": 1e-6},
    ],
)
def test_what_transformers_writes(arguments: dict[str, Any], tmp_path: Path) -> None:
    """``to_dict`` and a saved ``config.json`` read alike, and hold what the ``MixtralConfig`` holds."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MixtralConfig(**arguments)
    ours = parse_config(theirs.to_dict(), "transformers")
    theirs.save_pretrained(tmp_path)
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == ours
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "max_position_embeddings"),
        *("rms_norm_eps", "sliding_window", "tie_word_embeddings", "bos_token_id"),
    )
    for name in same:
        assert getattr(ours, name) == getattr(theirs, name), name
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (tuple(eos) if isinstance(eos, list) else (eos,))
    assert ours.head_dim == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads)
    rope = theirs.rope_parameters
    assert (ours.rope_theta, ours.rope_scaling_factor) == (rope["rope_theta"], rope.get("factor", 1.0))
    assert ours.dtype == (arguments.get("dtype") or "float32")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only 'mixtral'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; Mixtral's experts use 'silu'"),
        ({"hidden_size": -48}, "hidden_size is -48; it must be a positive integer"),
        ({"hidden_size": 48.0}, "hidden_size is 48.0; it must be a positive integer"),
        ({"vocab_size": None}, "vocab_size is None; it must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a positive integer"),
        ({"intermediate_size": "80"}, "intermediate_size is '80'; it must be a positive integer"),
        ({"num_key_value_heads": 4}, "6 attention heads do not divide over 4 key-value heads"),
        ({"head_dim": 7}, "head_dim is 7; rotary embedding needs an even one"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, more than the 5 experts"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; it must be a positive number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; it must be a positive number"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a positive number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE scaling of type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "RoPE scaling of type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "RoPE scaling: factor is 0.0; it must be a positive"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "RoPE scaling: factor is '2'; it must be a positive"),
        ({"rope_scaling": "linear"}, "the RoPE parameters are 'linear'; they must be a JSON object"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be a positive integer"),
        ({"sliding_window": 4.5}, "sliding_window is 4.5; it must be a positive integer"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id"),
        ({"eos_token_id": [2, None]}, "eos_token_id is [2, None]; it must be a token id"),
        ({"bos_token_id": -1}, "bos_token_id is -1; it must be a token id"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'; it must be one of float16, bfloat16, float32"),
    ],
)
def test_refusals(overrides: dict[str, Any], message: str) -> None:
    """One line that names the file, the key and its value."""
    with pytest.raises(UserError) as caught:
        parse(**overrides)
    assert str(caught.value).startswith("config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_missing_key(key: str) -> None:
    with pytest.raises(UserError, match=f"^config.json: {key} is None; it must be a positive integer$"):
        parse_without(key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "holds list, not a JSON object"),
        (b"{}", "model_type is None"),
    ],
)
def test_broken_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "nowhere/config.json", "."])
def test_missing_file(name: str, tmp_path: Path) -> None:
    """Neither file nor folder, or a folder without a ``config.json``."""
    with pytest.raises(UserError, match=r"config\.json: not found; give a preset \(8x7b, 8x22b\)|nowhere: not found"):
        load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("8x7b", 46.7), ("8x22b", 140.6)],
)
def test_presets_have_the_published_sizes(name: str, billions: float) -> None:
    from moecompiler.checkpoint import expected_tensors

    config = load_config(name)
    assert config is PRESETS[name]
    sizes = expected_tensors(config).values()
    total = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in sizes)
    assert total / 1e9 == pytest.approx(billions, abs=0.05)


def test_cut_to_fewer_layers() -> None:
    assert PARSED.with_layers(None) == PARSED
    assert PARSED.with_layers(2) == replace(PARSED, num_hidden_layers=2)
    for count in (0, 4, -1):
        with pytest.raises(UserError, match=f"--num_layers {count}: the model has 3 layers"):
            PARSED.with_layers(count)


def test_json_round_trip() -> None:
    config = replace(PARSED, eos_token_ids=(2, 3), sliding_window=7)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    options = ExportOptions("float16", NormalizationMode.SPARSE_MIXER, 77, True)
    assert ExportOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
