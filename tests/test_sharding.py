"""The sharding table: the ranks' shares have the module's shapes, and together they are the checkpoint's tensors.

Every element of the checkpoint is a number of its own here, and zero is none of them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import GRID
from readers import ArrayReader

from moecompiler.checkpoint import expected_tensors
from moecompiler.config import ModelConfig, parse_config
from moecompiler.export import INVERSE_FREQUENCIES
from moecompiler.mapping import Mapping, check_mapping
from moecompiler.model import RankModule
from moecompiler.sharding import inverse_frequencies, recipe_for
from moecompiler.weights import Recipe, Shape, materialize

CONFIG = parse_config(tiny_config(vocab_size=61, num_hidden_layers=4), "tiny")
GRID_NAMES = pytest.mark.parametrize("name", GRID)
LAYER = "model.layers.1"
EXPERT = f"{LAYER}.block_sparse_moe.experts.{{}}.{{}}.weight"


def numbered(config: ModelConfig) -> ArrayReader:
    """A checkpoint whose elements count from 1, through all tensors."""
    arrays, first = {}, 1
    for name, shape in expected_tensors(config).items():
        size = int(np.prod(shape))
        arrays[name] = np.arange(first, first + size, dtype=np.float32).reshape(shape)
        first += size
    assert first < 2**24, "float32 could not tell them apart"
    return ArrayReader(arrays)


def parameters(config: ModelConfig, mapping: Mapping, rank: int) -> dict[str, Shape]:
    """The rank module's parameters and buffers that come from the sharding table."""
    with torch.device("meta"):
        state = RankModule(config, mapping, rank).state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if name != INVERSE_FREQUENCIES}


def recipes(config: ModelConfig, mapping: Mapping, rank: int) -> dict[str, Recipe]:
    return {name: recipe_for(name, config, mapping, rank, "float32") for name in parameters(config, mapping, rank)}


def check_ranks_cover_the_checkpoint(config: ModelConfig, mapping: Mapping) -> None:
    """Counts over all ranks how often each element of the checkpoint is held: as often as the kind of tensor says."""
    reader = numbered(config)
    held = [
        materialize(recipe, reader).ravel()
        for rank in range(mapping.world_size)
        for recipe in recipes(config, mapping, rank).values()
        if recipe.values is None
    ]
    counts = np.bincount(np.concatenate(held).astype(np.int64))
    padding = 0
    for name, array in reader.arrays.items():
        replicated = "norm" in name or name.endswith("gate.weight")
        kv_copies = max(1, mapping.tp_size // config.num_key_value_heads)
        copies = mapping.tp_size if replicated else kv_copies if "k_proj" in name or "v_proj" in name else 1
        assert set(counts[array.astype(np.int64).ravel()]) == {copies}, name
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            padding += -config.vocab_size % mapping.tp_size * config.hidden_size
    assert counts[0] == padding


@GRID_NAMES
def test_shapes_are_the_modules(name: str) -> None:
    mapping = GRID[name]
    for rank in range(mapping.world_size):
        for parameter, shape in parameters(CONFIG, mapping, rank).items():
            recipe = recipe_for(parameter, CONFIG, mapping, rank, "float16")
            assert recipe.shape == shape, parameter
            assert recipe.dtype == ("float16" if recipe.values is None else "int64"), parameter


@GRID_NAMES
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_ranks_cover_the_checkpoint(name: str, kv_heads: int) -> None:
    check_ranks_cover_the_checkpoint(replace(CONFIG, num_key_value_heads=kv_heads), GRID[name])


@st.composite
def split_models(draw: st.DrawFn) -> tuple[ModelConfig, Mapping]:
    small = st.integers(1, 4)
    mapping = Mapping.create((moe_tp := draw(small)) * (moe_ep := draw(small)), draw(st.integers(1, 3)), moe_tp, moe_ep)
    tp_size = mapping.tp_size
    kv_heads = draw(st.sampled_from([n for n in range(1, 2 * tp_size + 1) if tp_size % n == 0 or n % tp_size == 0]))
    config = replace(
        CONFIG,
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 6)),
        intermediate_size=moe_tp * draw(small),
        num_hidden_layers=mapping.pp_size + draw(st.integers(0, 2)),
        num_attention_heads=math.lcm(kv_heads, tp_size) * draw(st.integers(1, 2)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 2)),
        num_local_experts=moe_ep * draw(st.integers(1, 2)),
        num_experts_per_tok=1,
    )
    check_mapping(config, mapping)
    return config, mapping


@settings(max_examples=60, deadline=None)
@given(split_models())
def test_ranks_cover_any_checkpoint(model: tuple[ModelConfig, Mapping]) -> None:
    check_ranks_cover_the_checkpoint(*model)


@GRID_NAMES
def test_ranks_together_are_the_tensors(name: str) -> None:
    """Put side by side in the order of ranks, the shares of the last stage are the tensors, in the layout of HF's modules."""
    mapping = GRID[name]
    config = replace(CONFIG, num_hidden_layers=mapping.pp_size + 1)  # layer 1 is on the first stage
    reader = numbered(config)
    source = reader.arrays

    def shares(parameter: str, stage: int = 0) -> list[np.ndarray]:
        ranks = range(stage * mapping.tp_size, (stage + 1) * mapping.tp_size)
        return [materialize(recipe_for(parameter, config, mapping, rank, "float32"), reader) for rank in ranks]

    def attention(projection: str) -> np.ndarray:
        return source[f"{LAYER}.self_attn.{projection}.weight"]

    for parameter, stage in (("model.embed_tokens.weight", 0), ("lm_head.weight", mapping.pp_size - 1)):
        rows = np.concatenate(shares(parameter, stage))
        np.testing.assert_array_equal(rows[: config.vocab_size], source[parameter])
        assert not rows[config.vocab_size :].any()
    np.testing.assert_array_equal(np.concatenate(shares(f"{LAYER}.self_attn.q_proj.weight")), attention("q_proj"))
    np.testing.assert_array_equal(np.concatenate(shares(f"{LAYER}.self_attn.o_proj.weight"), 1), attention("o_proj"))
    copies = max(1, mapping.tp_size // config.num_key_value_heads)
    for projection in ("k_proj", "v_proj"):
        rows = np.concatenate(shares(f"{LAYER}.self_attn.{projection}.weight")[::copies])
        np.testing.assert_array_equal(rows, attention(projection))
    for norm in ("input_layernorm", "post_attention_layernorm"):
        for share in shares(f"{LAYER}.{norm}.weight"):
            np.testing.assert_array_equal(share, source[f"{LAYER}.{norm}.weight"])
    for share in shares(f"{LAYER}.mlp.gate.weight"):
        np.testing.assert_array_equal(share, source[f"{LAYER}.block_sparse_moe.gate.weight"])

    gate_up, down = shares(f"{LAYER}.mlp.experts.gate_up_proj"), shares(f"{LAYER}.mlp.experts.down_proj")
    ids = shares(f"{LAYER}.mlp.experts.expert_ids")
    for expert in range(config.num_local_experts):
        # ranks that hold it, in order, are those that split its intermediate size
        held = [(rank, list(local).index(expert)) for rank, local in enumerate(ids) if expert in local]
        assert len(held) == mapping.moe_tp_size
        gates, ups = zip(*(np.split(gate_up[rank][at], 2) for rank, at in held), strict=True)
        np.testing.assert_array_equal(np.concatenate(gates), source[EXPERT.format(expert, "w1")])
        np.testing.assert_array_equal(np.concatenate(ups), source[EXPERT.format(expert, "w3")])
        downs = [down[rank][at] for rank, at in held]
        np.testing.assert_array_equal(np.concatenate(downs, 1), source[EXPERT.format(expert, "w2")])


@pytest.mark.parametrize(
    ("tp_size", "vocab_size", "counts"),
    [(4, 61, [16, 16, 16, 13]), (3, 61, [21, 21, 19]), (2, 64, [32, 32]), (8, 9, [2, 2, 2, 2, 1, 0, 0, 0])],
)
def test_vocabulary_is_padded_with_zeros(tp_size: int, vocab_size: int, counts: list[int]) -> None:
    """Every rank has as many rows as the first; where the vocabulary ends, zeros follow, if need be on a whole rank."""
    config = replace(CONFIG, num_attention_heads=24, vocab_size=vocab_size)
    mapping, reader = Mapping.create(tp_size), numbered(config)
    for rank, count in enumerate(counts):
        for parameter in ("model.embed_tokens.weight", "lm_head.weight"):
            share = materialize(recipe_for(parameter, config, mapping, rank, "float32"), reader)
            first = rank * counts[0]
            assert share.shape == (counts[0], config.hidden_size)
            np.testing.assert_array_equal(share[:count], reader.arrays[parameter][first : first + count])
            assert not share[count:].any()
        assert recipe_for("model.embed_tokens.first_row", config, mapping, rank, "float32").values == (first,)


@pytest.mark.parametrize("name", ["ep2", "ep8", "tp2-ep2", "ep2-pp2"])
def test_only_local_experts_are_read(name: str) -> None:
    """Under expert parallelism a rank reads its experts' weights alone, and of everything not a byte more than it holds."""
    mapping = GRID[name]
    for rank in range(mapping.world_size):
        reader = numbered(CONFIG)
        mine = recipes(CONFIG, mapping, rank)
        for recipe in mine.values():
            materialize(recipe, reader)
        each = CONFIG.num_local_experts // mapping.moe_ep_size
        first = mapping.moe_ep_rank(rank) * each
        experts = {
            int(source.split(".experts.")[1].split(".")[0]) for source, _ in reader.reads if ".experts." in source
        }
        assert experts == set(range(first, first + each))
        layers = {int(source.split(".")[2]) for source, _ in reader.reads if source.startswith("model.layers.")}
        assert layers == set(mapping.layers(rank, CONFIG.num_hidden_layers))
        read = sum(int(np.prod(shape)) for _, shape in reader.reads)
        vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
        padding = sum(np.count_nonzero(materialize(mine[name], reader) == 0) for name in vocabulary if name in mine)
        assert read == sum(int(np.prod(recipe.shape)) for recipe in mine.values() if recipe.values is None) - padding


def test_unknown_parameter() -> None:
    with pytest.raises(KeyError, match=r"no sharding rule for parameter 'model\.layers\.0\.mlp\.bias'"):
        recipe_for("model.layers.0.mlp.bias", CONFIG, Mapping(), 0, "float32")


@pytest.mark.parametrize(
    "changes", [{}, {"rope_theta": 1e6, "head_dim": 128}, {"rope_scaling_factor": 4.0}, {"head_dim": 2}]
)
def test_inverse_frequencies_are_hfs(changes: dict[str, float]) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    config = replace(CONFIG, **changes)
    scaled = config.rope_scaling_factor != 1.0
    rope = {"rope_type": "linear", "factor": config.rope_scaling_factor} if scaled else {"rope_type": "default"}
    theirs = MixtralRotaryEmbedding(
        MixtralConfig(head_dim=config.head_dim, rope_parameters=rope | {"rope_theta": config.rope_theta})
    )
    np.testing.assert_allclose(inverse_frequencies(config), theirs.inv_freq.numpy(), rtol=3e-7)
