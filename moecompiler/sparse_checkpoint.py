"""Checkpoints of any size that take no disk: true names, shapes, shards and index, over sparse files of zeros.

For measuring what handles weights by reference. Shards are filled as ``transformers``' ``save_pretrained`` fills them: tensors in
the order of the published model, a new file where the next would pass ``SHARD_BYTES``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moecompiler.checkpoint import expected_tensors
from moecompiler.checkpoint_files import INDEX
from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.safetensors_file import layout
from moecompiler.weights import NUMPY_DTYPES, Shape

SHARD_BYTES = 5 * 10**9  # transformers' "5GB"; the published 8x7b has 19 files, 8x22b 59


def write_sparse_checkpoint(config: ModelConfig, directory: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Makes ``directory`` a checkpoint of ``config`` in its own dtype, all weights 0; returns the bytes of its weights.

    Raises: UserError where the directory is not empty, or cannot be written.
    """
    shapes = expected_tensors(config)
    shards = split_into_shards({name: _nbytes(shape, config.dtype) for name, shape in shapes.items()}, shard_bytes)
    weight_map: dict[str, str] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise UserError(f"{directory}: is not empty; give an empty or new folder")
        for index, names in enumerate(shards, 1):
            file = f"model-{index:05}-of-{len(shards):05}.safetensors"
            header, _, size = layout({name: (config.dtype, shapes[name]) for name in names})
            with (directory / file).open("wb") as stream:
                stream.write(header)
                stream.truncate(size)
            weight_map |= dict.fromkeys(names, file)
        total = sum(_nbytes(shape, config.dtype) for shape in shapes.values())
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(directory / "config.json", hf_config(config))
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be written: {error.strerror}") from None
    return total


def split_into_shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """The names in files of at most ``shard_bytes``, in their order; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The content of a ``config.json`` that ``config.load_config`` and ``transformers`` read as ``config``."""
    linear = {"rope_scaling": {"type": "linear", "factor": config.rope_scaling_factor}}
    ends = list(config.eos_token_ids)
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
    } | (linear if config.rope_scaling_factor != 1.0 else {})


def _nbytes(shape: Shape, dtype: str) -> int:
    count = NUMPY_DTYPES[dtype].itemsize
    for size in shape:
        count *= size
    return count


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
