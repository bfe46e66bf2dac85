"""Small checkpoints for tests: random Mixtrals, saved by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

from moecompiler.checkpoint import expected_tensors
from moecompiler.config import ModelConfig
from moecompiler.safetensors_file import layout


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """The content of a tiny Mixtral's ``config.json``; in it every size differs from those it could be mistaken for."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | overrides


def random_model(
    config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.2
) -> transformers.MixtralForCausalLM:
    """A Mixtral with normal weights of ``std``, wide enough for logits that differ, and norms around 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf_config = transformers.MixtralConfig(**config)
        model = transformers.MixtralForCausalLM(hf_config)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter.data, 1.0 if "norm" in name else 0.0, std)
    return model.to(dtype).eval()


def published_weights(model: transformers.MixtralForCausalLM) -> dict[str, np.ndarray]:
    """The model's weights under their published names, in float32; the experts cut apart as ``MixtralExperts.forward`` does."""
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    for layer in range(model.config.num_hidden_layers):
        old, new = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        state[f"{new}.gate.weight"] = state.pop(f"{old}.gate.weight")
        gate_up, down = state.pop(f"{old}.experts.gate_up_proj"), state.pop(f"{old}.experts.down_proj")
        for expert in range(model.config.num_local_experts):
            gate, up = np.split(gate_up[expert], 2)
            state |= {
                f"{new}.experts.{expert}.{w}.weight": v for w, v in (("w1", gate), ("w2", down[expert]), ("w3", up))
            }
    return state


def save_hf(
    directory: Path,
    config: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layout: Literal["published", "fused"] = "published",
    max_shard_size: str | None = None,
    tokenizer: bool = False,
) -> Path:
    """Saves ``random_model`` in ``directory`` as transformers does, and returns the directory.

    ``layout``: the experts by themselves, as on the hub, or fused, as in memory. ``max_shard_size``: such as ``"20KB"``.
    ``tokenizer``: with a ``tokenizer.json``, see ``byte_tokenizer``.
    """
    model = random_model(config or tiny_config(), seed, dtype)
    size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(directory, save_original_format=layout == "published", **size)
    if tokenizer:
        byte_tokenizer(model.config.vocab_size).save_pretrained(directory)
    return directory


def byte_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """One token a byte: ids 0 to 2 are ``<unk>``, ``<s>``, ``</s>``; then letters, space, digits, punctuation, all other
    bytes, as far as ``vocab_size`` goes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    common = "abcdefghijklmnopqrstuvwxyzĠĊ0123456789.,;:!?'()_=+-*/"  # Ġ and Ċ stand for space and newline
    symbols = ["<unk>", "<s>", "</s>", *common, *(symbol for symbol in alphabet if symbol not in common)][:vocab_size]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


Change = Callable[[dict[str, torch.Tensor]], Any]


def without(*parts: str) -> Change:
    """For ``edit``: drops the tensors whose names hold one of ``parts``."""
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if any(part in name for part in parts)]


def with_tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    """For ``edit``: adds or replaces a tensor by one of ones."""
    return lambda tensors: tensors.update({name: torch.ones(shape).to(dtype)})


def edit(directory: Path, change: Change) -> Path:
    """Applies ``change`` to what ``model.safetensors`` holds."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def save_hollow(directory: Path, config: ModelConfig, ones: dict[str, int]) -> int:
    """A bfloat16 checkpoint of any size that takes no disk: a sparse file of zeros, and a one at an index of each of
    ``ones``. Returns the file's size."""
    shapes = expected_tensors(config)
    header, offsets, total = layout({name: ("bfloat16", shape) for name, shape in shapes.items()})
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(total)
        for name, index in ones.items():
            file.seek(offsets[name] + 2 * index)
            file.write(b"\x80\x3f")
    return total
