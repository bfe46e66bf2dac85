"""The floor of a decode step: what has to be read, computed and exchanged, at the speeds of the hardware."""

from __future__ import annotations

from dataclasses import dataclass

from moecompiler.config import ModelConfig
from moecompiler.mapping import Mapping, rank_shape
from moecompiler.planning.hardware import Cluster
from moecompiler.planning.load import Load, attention_bytes, cache_bytes_per_token, expert_bytes, matrix_bytes
from moecompiler.planning.routing import most_hit

MEASURED_SHARE = 0.887  # of this floor that a decode step of one H100 reached: docs/benchmarks/tensorrt-2026-11-25.md


@dataclass(frozen=True)
class Layer:
    """A decode step of a layer: ``bytes`` that the busiest rank reads, ``flops`` of a rank, and ``messages`` among the stage's
    ranks of ``message_bytes`` each."""

    bytes: float
    flops: float
    messages: int
    message_bytes: int


@dataclass(frozen=True)
class Step:
    """Seconds of a decode step for all sequences, one stage after another: reading or computing, whichever takes longer;
    exchanges within stages; exchanges between stages. ``bytes``: that the busiest ranks read; ``messages``: exchanges in all."""

    working_s: float
    reducing_s: float
    sending_s: float
    bytes: float
    messages: int

    @property
    def floor_s(self) -> float:
        return self.working_s + self.reducing_s + self.sending_s

    @property
    def expected_s(self) -> float:
        """The floor, and work at the share of its floor that was measured on one GPU; exchanges are not measured."""
        return self.working_s / MEASURED_SHARE + self.reducing_s + self.sending_s


def decode_layer(config: ModelConfig, mapping: Mapping, load: Load, layer: int, context: int) -> Layer:
    """For ``load.batch`` sequences of ``context`` tokens each."""
    shape, hidden, size = rank_shape(config, mapping), config.hidden_size, load.itemsize
    hit = most_hit(config.num_local_experts, config.num_experts_per_tok, load.batch, mapping.moe_ep_size)
    router_norms = (config.num_local_experts + 2) * hidden * size
    cache = load.batch * context * cache_bytes_per_token(config, mapping, load)
    read = attention_bytes(config, mapping, load, layer) + router_norms + cache
    read_experts = hit * expert_bytes(config, mapping, load, layer)
    attention = 2 * (shape.heads + shape.kv_heads) * config.head_dim * hidden
    scores = 2 * shape.heads * config.head_dim * context
    experts = 3 * config.num_experts_per_tok * config.intermediate_size * hidden / mapping.tp_size
    router = config.num_local_experts * hidden
    flops = 2 * load.batch * (attention + scores + experts + router)
    return Layer(read + read_experts, flops, 2 * (mapping.tp_size > 1), load.batch * hidden * size)


def decode_step(config: ModelConfig, mapping: Mapping, load: Load, cluster: Cluster, context: int) -> Step:
    """For ``load.batch`` sequences of ``context`` tokens each. All-reduces are counted as moving ``2 (n-1)/n`` of a message over
    a GPU's link, the vocabulary's gather ``(n-1)/n``, and each exchange as its latency besides."""
    gpu, tp = cluster.gpu, mapping.tp_size
    table = (rank_shape(config, mapping).vocab, config.hidden_size)
    hidden_bytes = load.batch * config.hidden_size * load.itemsize
    working = reducing = sending = read = 0.0
    messages = 0
    for stage in range(mapping.pp_size):
        first = stage * tp
        latency, speed = cluster.reach(first, first + tp - 1)

        def reduce(size: float, times: float, latency: float = latency, speed: float = speed) -> float:
            return latency + times * (tp - 1) / tp * size / speed

        for number in mapping.layers(first, config.num_hidden_layers):
            layer = decode_layer(config, mapping, load, number, context)
            working += max(layer.bytes / gpu.bandwidth, layer.flops / gpu.flops)
            reducing += layer.messages * reduce(layer.message_bytes, 2)
            read += layer.bytes
            messages += layer.messages
        if mapping.is_last_stage(first):
            head = matrix_bytes(table, load.itemsize, load.scheme_of("lm_head"))
            working += max(head / gpu.bandwidth, 2 * load.batch * table[0] * table[1] / gpu.flops)
            read += head
        if tp > 1:
            vocabulary = reduce(hidden_bytes, 2) * mapping.is_first_stage(first)  # embeddings are added up
            vocabulary += reduce(load.batch * config.vocab_size * load.itemsize, 1) * mapping.is_last_stage(first)
            reducing += vocabulary
            messages += mapping.is_first_stage(first) + mapping.is_last_stage(first)
        if stage:
            latency, speed = cluster.reach(first - 1, first)
            sending += latency + hidden_bytes / speed
            messages += 1
    if mapping.pp_size > 1:  # the last stage tells all which tokens it chose
        sending += cluster.reach(0, mapping.world_size - 1)[0]
        messages += 1
    return Step(working, reducing, sending, read, messages)
