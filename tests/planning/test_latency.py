"""The floor of a decode step against figures counted by hand, and against what was measured on an H100."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest

from moecompiler.config import PRESETS
from moecompiler.mapping import Mapping
from moecompiler.planning.hardware import Cluster, gpu_named
from moecompiler.planning.latency import decode_layer, decode_step
from moecompiler.planning.load import Load, expert_bytes
from moecompiler.planning.routing import experts_hit, most_hit

H100 = gpu_named("h100")


def test_experts_hit_against_all_choices() -> None:
    """Every way in which two tokens can choose two of four experts."""
    pairs = list(combinations(range(4), 2))
    choices = [set(a) | set(b) for a, b in product(pairs, pairs)]
    assert experts_hit(4, 2, 2) == pytest.approx([sum(len(c) == n for c in choices) / 36 for n in range(5)])
    busiest = [max(len(c & {0, 1}), len(c & {2, 3})) for c in choices]
    assert most_hit(4, 2, 2, 2) == pytest.approx(sum(busiest) / 36)


@pytest.mark.parametrize(
    ("tokens", "ranks", "expected"),
    [(1, 1, 2), (2, 1, 3.5), (4, 1, 8 * (1 - 0.75**4)), (1, 8, 1), (1, 2, 1 + 3 / 7), (64, 1, 8), (64, 4, 2)],
)
def test_most_hit(tokens: int, ranks: int, expected: float) -> None:
    assert most_hit(8, 2, tokens, ranks) == pytest.approx(expected, rel=1e-6)


def test_the_floor_of_the_measured_decode_step() -> None:
    """tools/bench_engine_decode.py: 4 layers of 8x7b and the head, float16, one sequence of 128 tokens: 1092 µs at 3.13 TB/s."""
    config, load = PRESETS["8x7b"].with_layers(4), Load("float16", batch=1, slots=128)
    step = decode_step(config, Mapping(), load, Cluster(H100, 1), 128)
    assert step.floor_s == pytest.approx(1092e-6, rel=0.005)
    assert step.expected_s == pytest.approx(1231e-6, rel=0.005)
    assert step.messages == 0


def test_the_floor_of_the_measured_experts() -> None:
    """tools/bench_engine_moe.py: 225.2 µs for a token of 8x7b, 386.0 of 8x22b."""
    for model, microseconds in (("8x7b", 225.2), ("8x22b", 386.0)):
        read = 2 * expert_bytes(PRESETS[model], Mapping(), Load("float16"), 0)
        assert 1e6 * read / H100.bandwidth == pytest.approx(microseconds, rel=0.002)


def test_splitting_reads_less_and_exchanges_more() -> None:
    config, load, cluster = PRESETS["8x7b"], Load(batch=1), Cluster(H100, 8)
    one, tp8 = (decode_step(config, mapping, load, cluster, 0) for mapping in (Mapping(), Mapping.create(8)))
    assert tp8.bytes == pytest.approx(one.bytes / 8, rel=0.01)  # norms and router are everybody's
    assert tp8.messages == 2 * 32 + 2
    message = 2 * 4096
    seconds = 65 * (8e-6 + 2 * 7 / 8 * message / 450e9) + 8e-6 + 7 / 8 * 2 * 32000 / 450e9
    assert tp8.reducing_s == pytest.approx(seconds)


def test_one_token_reads_a_whole_expert_where_experts_are_whole() -> None:
    config, load = PRESETS["8x7b"], Load(batch=1)
    tp8, ep8 = Mapping.create(8), Mapping.create(8, moe_ep_size=8)
    more = decode_layer(config, ep8, load, 0, 0).bytes - decode_layer(config, tp8, load, 0, 0).bytes
    assert more == pytest.approx(3 * 14336 * 4096 * 2 * (1 - 2 / 8))


def test_stages_follow_each_other_and_nodes_are_crossed() -> None:
    config, load = PRESETS["8x7b"], Load(batch=1)
    cluster = Cluster(H100, 16)
    pp2, crossing = (decode_step(config, m, load, cluster, 0) for m in (Mapping.create(8, 2), Mapping.create(16)))
    assert pp2.working_s == pytest.approx(decode_step(config, Mapping.create(8), load, cluster, 0).working_s)
    # to the other node, where the second stage is, and the tokens back
    assert pp2.sending_s == pytest.approx(2 * 30e-6 + 2 * 4096 / 50e9)
    assert crossing.sending_s == 0
    assert crossing.reducing_s > 65 * 30e-6 > pp2.reducing_s
    near = decode_step(config, Mapping.create(16), load, replace(cluster, gpus_per_node=16), 0)
    assert near.reducing_s < 66 * 9e-6


def test_many_tokens_are_computed_not_read() -> None:
    config, load = PRESETS["8x7b"].with_layers(1), Load(batch=4096)
    layer = decode_layer(config, Mapping(), load, 0, 0)
    experts = 2 * 4096 * 2 * 3 * 14336 * 4096
    attention = 2 * 4096 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    assert layer.flops == experts + attention + 2 * 4096 * 8 * 4096
    assert layer.flops / H100.flops > layer.bytes / H100.bandwidth
