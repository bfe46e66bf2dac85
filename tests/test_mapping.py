"""Mappings: the rules that fill in sizes, each rank's place, the split of layers, and what cannot be split."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping, RankShape, check_mapping, rank_shape

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=24,
    num_hidden_layers=5,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=8,
    num_local_experts=6,
    num_experts_per_tok=2,
    max_position_embeddings=64,
)
SIZES = [(tp, pp, moe_tp, tp // moe_tp) for tp in (1, 2, 3, 4, 6, 8, 12) for pp in (1, 2, 3) for moe_tp in (1, 2, 3, 4)]
MAPPINGS = [Mapping(*sizes) for sizes in SIZES if sizes[2] * sizes[3] == sizes[0]]


@pytest.mark.parametrize(
    ("given", "moe_tp", "moe_ep"),
    [
        ({}, 4, 1),
        ({"moe_tp_size": 4}, 4, 1),
        ({"moe_ep_size": 4}, 1, 4),
        ({"moe_tp_size": 2, "moe_ep_size": 2}, 2, 2),
        ({"moe_tp_size": 1, "moe_ep_size": 4}, 1, 4),
        ({"moe_tp_size": 4, "moe_ep_size": 1}, 4, 1),
    ],
)
def test_what_is_not_given_is_filled_in(given: dict[str, int], moe_tp: int, moe_ep: int) -> None:
    """Neither or only ``moe_tp_size``: experts tensor-parallel; only ``moe_ep_size``: expert-parallel; both: hybrid."""
    mapping = Mapping.create(tp_size=4, pp_size=3, **given)
    assert mapping == Mapping(4, 3, moe_tp, moe_ep)
    assert mapping.world_size == 12


def test_one_rank_is_the_default() -> None:
    assert Mapping.create() == Mapping(1, 1, 1, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tp_size": 4, "moe_tp_size": 2}, "--moe_tp_size 2 × --moe_ep_size 1 = 2, but it must equal --tp_size 4"),
        ({"tp_size": 4, "moe_ep_size": 8}, "--moe_tp_size 1 × --moe_ep_size 8 = 8, but it must equal --tp_size 4"),
        (
            {"tp_size": 4, "moe_tp_size": 2, "moe_ep_size": 4},
            "--moe_tp_size 2 × --moe_ep_size 4 = 8, but it must equal --tp_size 4",
        ),
        ({"tp_size": 0}, "--tp_size 0: a parallel size is at least 1"),
        ({"pp_size": -1}, "--pp_size -1: a parallel size is at least 1"),
        ({"moe_tp_size": 0}, "--moe_tp_size 0: a parallel size is at least 1"),
        ({"tp_size": 2, "moe_ep_size": 0}, "--moe_ep_size 0: a parallel size is at least 1"),
    ],
)
def test_refused_sizes(given: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Mapping.create(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize("mapping", MAPPINGS, ids=str)
def test_ranks_fill_the_table(mapping: Mapping) -> None:
    """Counting with ``moe_ep`` fastest, then ``moe_tp``, then ``pp`` meets every place once, in the order of ranks."""
    places = product(range(mapping.pp_size), range(mapping.moe_tp_size), range(mapping.moe_ep_size))
    for rank, (pp, moe_tp, moe_ep) in enumerate(places):
        assert mapping.pp_rank(rank) == pp
        assert mapping.moe_tp_rank(rank) == moe_tp
        assert mapping.moe_ep_rank(rank) == moe_ep
        assert mapping.tp_rank(rank) == moe_tp * mapping.moe_ep_size + moe_ep
        assert mapping.is_first_stage(rank) == (pp == 0)
        assert mapping.is_last_stage(rank) == (pp == mapping.pp_size - 1)
    assert rank == mapping.world_size - 1


@pytest.mark.parametrize("mapping", MAPPINGS, ids=str)
def test_groups_partition_the_world(mapping: Mapping) -> None:
    """Every rank is in its own group, in the place of its tp rank, and the groups cover the world without overlap."""
    groups = {mapping.tp_group(rank) for rank in range(mapping.world_size)}
    assert sorted(rank for group in groups for rank in group) == list(range(mapping.world_size))
    for rank in range(mapping.world_size):
        group = mapping.tp_group(rank)
        assert group[mapping.tp_rank(rank)] == rank
        assert {mapping.pp_rank(peer) for peer in group} == {mapping.pp_rank(rank)}


@pytest.mark.parametrize(
    ("pp_size", "num_layers", "counts"),
    [(1, 5, [5]), (2, 5, [3, 2]), (3, 5, [2, 2, 1]), (4, 5, [2, 1, 1, 1]), (5, 5, [1] * 5), (4, 32, [8] * 4)],
)
def test_layers(pp_size: int, num_layers: int, counts: list[int]) -> None:
    """Stages hold neighbouring layers in order, the first ones one more where they do not divide."""
    mapping = Mapping.create(2, pp_size)
    stages = [mapping.layers(rank, num_layers) for rank in range(mapping.world_size)]
    assert stages[::2] == stages[1::2]
    assert [len(stage) for stage in stages[::2]] == counts
    assert [layer for stage in stages[::2] for layer in stage] == list(range(num_layers))


@pytest.mark.parametrize(
    ("changes", "mapping", "message"),
    [
        ({}, Mapping.create(5), "--tp_size 5: the model's 12 attention heads do not divide over 5 ranks"),
        ({}, Mapping.create(6), "--tp_size 6: the model's 4 key-value heads neither divide over 6 ranks nor"),
        ({}, Mapping.create(pp_size=6), "--pp_size 6: more stages than the model's 5 layers"),
        ({}, Mapping.create(12, moe_ep_size=12), "--moe_ep_size 12: more ranks than the 6 experts"),
        ({}, Mapping.create(4, moe_ep_size=4), "--moe_ep_size 4: the 6 experts do not divide over 4 ranks"),
        (
            {"intermediate_size": 25},
            Mapping.create(2),
            "--moe_tp_size 2: the experts' intermediate size 25 does not divide over 2 ranks",
        ),
    ],
)
def test_what_does_not_divide(changes: dict[str, int], mapping: Mapping, message: str) -> None:
    """The message names the option and the sizes."""
    with pytest.raises(UserError) as caught:
        check_mapping(replace(CONFIG, **changes), mapping)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "shape"),
    [
        (Mapping.create(), RankShape(heads=12, kv_heads=4, experts=6, intermediate=24, vocab=61)),
        (Mapping.create(2), RankShape(heads=6, kv_heads=2, experts=6, intermediate=12, vocab=31)),
        (Mapping.create(4), RankShape(heads=3, kv_heads=1, experts=6, intermediate=6, vocab=16)),
        (Mapping.create(12), RankShape(heads=1, kv_heads=1, experts=6, intermediate=2, vocab=6)),
        (Mapping.create(2, moe_ep_size=2), RankShape(heads=6, kv_heads=2, experts=3, intermediate=24, vocab=31)),
        (Mapping.create(4, 5, 2, 2), RankShape(heads=3, kv_heads=1, experts=3, intermediate=12, vocab=16)),
    ],
    ids=str,
)
def test_rank_shape(mapping: Mapping, shape: RankShape) -> None:
    check_mapping(CONFIG, mapping)
    assert rank_shape(CONFIG, mapping) == shape


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        (Mapping.create(), "one rank"),
        (Mapping.create(4), "tp4"),
        (Mapping.create(1, 2), "pp2"),
        (Mapping.create(4, 2, moe_ep_size=4), "tp4·pp2·moe_ep4"),
        (Mapping.create(4, 1, 2, 2), "tp4·moe_tp2·moe_ep2"),
    ],
)
def test_name(mapping: Mapping, text: str) -> None:
    assert str(mapping) == text


def test_json_round_trip() -> None:
    mapping = Mapping.create(4, 2, 2, 2)
    assert Mapping(**mapping.to_json()) == mapping
