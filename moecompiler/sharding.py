"""One table, parameter → how it is split, and one pure function that cuts a rank's share of a model.

Parameters are named as in the rank module (``model.RankModule``), sources as in the published Mixtral checkpoints; the two
meet only in ``_TABLE``. ``{i}`` stands for a layer's number.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from moecompiler.config import ModelConfig
from moecompiler.mapping import Mapping, rank_shape
from moecompiler.weights import Piece, Recipe, Shape

Rule = Callable[[ModelConfig, Mapping, int, str, str], Recipe]


def _box(source: str, start: Shape, shape: Shape, at: Shape) -> Piece:
    return Piece(source, start, shape, at, tuple(range(len(at))))


def _replicated(config: ModelConfig, mapping: Mapping, rank: int, source: str, dtype: str) -> Recipe:
    """Every rank holds the whole tensor: norms ``[H]`` and the router ``[experts, H]``."""
    shape: Shape = (config.hidden_size,)
    if source.endswith("gate.weight"):
        shape = (config.num_local_experts, config.hidden_size)
    return Recipe(dtype, shape, (_box(source, (0,) * len(shape), shape, (0,) * len(shape)),))


def _vocabulary(config: ModelConfig, mapping: Mapping, rank: int, source: str, dtype: str) -> Recipe:
    """Rows of the vocabulary, ``[V, H]``; rows past its end are zeros, so that every rank has as many."""
    rows = rank_shape(config, mapping).vocab
    first = mapping.tp_rank(rank) * rows
    real = max(0, min(rows, config.vocab_size - first))
    pieces = (_box(source, (first, 0), (real, config.hidden_size), (0, 0)),) if real else ()
    return Recipe(dtype, (rows, config.hidden_size), pieces)


def _query_heads(config: ModelConfig, mapping: Mapping, rank: int, source: str, dtype: str) -> Recipe:
    """Output rows by query head, ``[heads * D, H]``."""
    rows = rank_shape(config, mapping).heads * config.head_dim
    shape = (rows, config.hidden_size)
    return Recipe(dtype, shape, (_box(source, (mapping.tp_rank(rank) * rows, 0), shape, (0, 0)),))


def _key_value_heads(config: ModelConfig, mapping: Mapping, rank: int, source: str, dtype: str) -> Recipe:
    """Output rows by key-value head, ``[kv_heads * D, H]``; with fewer heads than ranks, neighbours hold the same one."""
    heads = rank_shape(config, mapping).kv_heads
    first = mapping.tp_rank(rank) * config.num_key_value_heads // mapping.tp_size
    shape = (heads * config.head_dim, config.hidden_size)
    return Recipe(dtype, shape, (_box(source, (first * config.head_dim, 0), shape, (0, 0)),))


def _output_heads(config: ModelConfig, mapping: Mapping, rank: int, source: str, dtype: str) -> Recipe:
    """Input columns by query head, ``[H, heads * D]``."""
    columns = rank_shape(config, mapping).heads * config.head_dim
    shape = (config.hidden_size, columns)
    return Recipe(dtype, shape, (_box(source, (0, mapping.tp_rank(rank) * columns), shape, (0, 0)),))


def _local_experts(config: ModelConfig, mapping: Mapping, rank: int) -> range:
    count = rank_shape(config, mapping).experts
    first = mapping.moe_ep_rank(rank) * count
    return range(first, first + count)


def _gate_up(config: ModelConfig, mapping: Mapping, rank: int, source: str, dtype: str) -> Recipe:
    """``[local experts, 2F, H]``: each expert's w1 (gate) rows, then its w3 (up) rows."""
    rows, hidden = rank_shape(config, mapping).intermediate, config.hidden_size
    first = mapping.moe_tp_rank(rank) * rows
    pieces = tuple(
        _box(source.format(e=expert, w=w), (first, 0), (rows, hidden), (index, half * rows, 0))
        for index, expert in enumerate(_local_experts(config, mapping, rank))
        for half, w in enumerate(("w1", "w3"))
    )
    return Recipe(dtype, (len(pieces) // 2, 2 * rows, hidden), pieces)


def _down(config: ModelConfig, mapping: Mapping, rank: int, source: str, dtype: str) -> Recipe:
    """``[local experts, H, F]``: the columns of each expert's w2."""
    columns, hidden = rank_shape(config, mapping).intermediate, config.hidden_size
    first = mapping.moe_tp_rank(rank) * columns
    pieces = tuple(
        _box(source.format(e=expert, w="w2"), (0, first), (hidden, columns), (index, 0, 0))
        for index, expert in enumerate(_local_experts(config, mapping, rank))
    )
    return Recipe(dtype, (len(pieces), hidden, columns), pieces)


def _expert_ids(config: ModelConfig, mapping: Mapping, rank: int, source: str, dtype: str) -> Recipe:
    ids = tuple(_local_experts(config, mapping, rank))
    return Recipe("int64", (len(ids),), values=ids)


def _first_row(config: ModelConfig, mapping: Mapping, rank: int, source: str, dtype: str) -> Recipe:
    return Recipe("int64", (), values=(mapping.tp_rank(rank) * rank_shape(config, mapping).vocab,))


# parameter of the rank module                           rule                 source in the checkpoint
_TABLE: tuple[tuple[str, Rule, str], ...] = (
    ("model.embed_tokens.weight", _vocabulary, "model.embed_tokens.weight"),
    ("model.embed_tokens.first_row", _first_row, ""),
    ("model.layers.{i}.input_layernorm.weight", _replicated, "model.layers.{i}.input_layernorm.weight"),
    ("model.layers.{i}.self_attn.q_proj.weight", _query_heads, "model.layers.{i}.self_attn.q_proj.weight"),
    ("model.layers.{i}.self_attn.k_proj.weight", _key_value_heads, "model.layers.{i}.self_attn.k_proj.weight"),
    ("model.layers.{i}.self_attn.v_proj.weight", _key_value_heads, "model.layers.{i}.self_attn.v_proj.weight"),
    ("model.layers.{i}.self_attn.o_proj.weight", _output_heads, "model.layers.{i}.self_attn.o_proj.weight"),
    (
        "model.layers.{i}.post_attention_layernorm.weight",
        _replicated,
        "model.layers.{i}.post_attention_layernorm.weight",
    ),
    ("model.layers.{i}.mlp.gate.weight", _replicated, "model.layers.{i}.block_sparse_moe.gate.weight"),
    (
        "model.layers.{i}.mlp.experts.gate_up_proj",
        _gate_up,
        "model.layers.{i}.block_sparse_moe.experts.{{e}}.{{w}}.weight",
    ),
    (
        "model.layers.{i}.mlp.experts.down_proj",
        _down,
        "model.layers.{i}.block_sparse_moe.experts.{{e}}.{{w}}.weight",
    ),
    ("model.layers.{i}.mlp.experts.expert_ids", _expert_ids, ""),
    ("model.norm.weight", _replicated, "model.norm.weight"),
    ("lm_head.weight", _vocabulary, "lm_head.weight"),
)


def recipe_for(parameter: str, config: ModelConfig, mapping: Mapping, rank: int, dtype: str) -> Recipe:
    """The recipe of one parameter of rank ``rank``'s module, stored as ``dtype``.

    Raises: KeyError where the table has no such parameter.
    """
    for pattern, rule, source in _TABLE:
        regex = re.escape(pattern).replace(re.escape("{i}"), r"(\d+)")
        if found := re.fullmatch(regex, parameter):
            layer = found.group(1) if found.groups() else ""
            return rule(config, mapping, rank, source.format(i=layer), dtype)
    raise KeyError(f"no sharding rule for parameter {parameter!r}")


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """RoPE's inverse frequencies, float32 ``[D / 2]``, as ``MixtralRotaryEmbedding`` computes them; linear scaling divides
    them by its factor."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.power(np.float32(config.rope_theta), exponent)).astype(np.float32)
    return frequencies / np.float32(config.rope_scaling_factor)
