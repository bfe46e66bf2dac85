"""The rank module: one rank's share of a Mixtral, in plain torch, as it is exported.

Mirrors ``transformers.models.mixtral.modeling_mixtral``: modules have the same paths (``model.layers.3.mlp.experts``) and
parameters the same names, so that a node's origin reads the same in both. What differs: parameters are the rank's slices,
the KV cache is an explicit tensor of fixed length, all local experts are computed densely (static shapes), and the
collectives stand in ``forward``.

Shape letters: B batch, S new tokens, T cache slots, N query heads, K key-value heads, G = N/K, D head size, H hidden,
E local experts, F intermediate; all but B, S, T and H are the rank's share.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from moecompiler.collectives import all_gather, all_reduce
from moecompiler.config import ModelConfig, NormalizationMode
from moecompiler.mapping import Mapping, RankShape, rank_shape
from moecompiler.routing import route

Cache = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.Module):
    """``MixtralRMSNorm``: float32 inside, ``[..., H] -> [..., H]``."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """``MixtralRotaryEmbedding`` with linear scaling: positions ``[B, S]`` → cos, sin ``[B, 1, S, D]`` in ``dtype``."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.inv_freq = nn.Buffer(torch.empty(config.head_dim // 2, dtype=torch.float32))

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[:, None, :, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``apply_rotary_pos_emb`` on ``[B, heads, S, D]``."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class Attention(nn.Module):
    """``MixtralAttention`` over the rank's heads; the cache is written at ``position_ids`` and read whole under a mask.

    Tokens to the right of a prompt's end may write garbage into slots past it: a query sees only slots up to its own
    position, and each of those was written by a real token first.

    ``held`` and ``shares`` are where a reference rounds what goes into a quantized cache, and what meets it.
    """

    def __init__(self, config: ModelConfig, shape: RankShape, group: tuple[int, ...]):
        super().__init__()
        self.head_dim, self.heads, self.kv_heads = config.head_dim, shape.heads, shape.kv_heads
        self.window, self.group = config.sliding_window, group
        self.q_proj = nn.Linear(config.hidden_size, shape.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, shape.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shape.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,  # [B, S, H]
        rope: tuple[torch.Tensor, torch.Tensor],
        position_ids: torch.Tensor,  # [B, S]
        cache: Cache,  # each [B, K, T, D]
    ) -> tuple[torch.Tensor, Cache]:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = self.held(q, k, v)

        slots = position_ids[:, None, :, None].expand(k.shape)
        keys, values = cache[0].scatter(2, slots, k), cache[1].scatter(2, slots, v)

        # query heads that share a key-value head form one matrix, so no key or value is copied
        grouped = q.reshape(batch, self.kv_heads, -1, self.head_dim)  # [B, K, G·S, D]
        # scaled in float32: a graph's constant has its operand's type, and in bfloat16 the scale would be off by 1e-4
        scores = (grouped @ keys.transpose(2, 3)).float() * self.head_dim**-0.5
        scores = scores.view(batch, self.kv_heads, -1, length, keys.shape[2])  # [B, K, G, S, T]
        scores = scores.masked_fill(~self.visible(position_ids, keys.shape[2]), torch.finfo(scores.dtype).min)
        weights = self.shares(scores).to(x.dtype)
        out = weights.view(batch, self.kv_heads, -1, keys.shape[2]) @ values
        out = out.view(batch, self.heads, length, self.head_dim).transpose(1, 2).reshape(batch, length, -1)
        return all_reduce(self.o_proj(out), self.group), (keys, values)

    def held(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Heads ``[B, N, S, D]`` and ``[B, K, S, D]`` as they meet, and are kept in, the cache."""
        return q, k, v

    def shares(self, scores: torch.Tensor) -> torch.Tensor:
        """float32 ``[B, K, G, S, T]``; a reference may round them."""
        return torch.softmax(scores, dim=-1)

    def visible(self, position_ids: torch.Tensor, slots: int) -> torch.Tensor:
        """Which cache slots each query sees, bool ``[B, 1, 1, S, T]``."""
        query = position_ids[:, None, None, :, None]
        slot = torch.arange(slots, device=position_ids.device)
        seen = slot <= query
        return seen if self.window is None else seen & (slot > query - self.window)


class Router(nn.Module):
    """``MixtralTopKRouter``: ``[tokens, H]`` → the weight of every expert for every token, float32 ``[tokens, experts]``."""

    def __init__(self, config: ModelConfig, mode: NormalizationMode):
        super().__init__()
        self.top_k, self.mode = config.num_experts_per_tok, mode
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, self.weight)
        weights, experts = route(logits, self.top_k, self.mode)
        return torch.zeros_like(logits, dtype=torch.float32).scatter(1, experts, weights)


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


class Experts(nn.Module):
    """``MixtralExperts``, all local experts on all tokens: ``x [tokens, H]``, ``share [tokens, experts]`` → ``[tokens, H]``.

    ``expert_ids`` says which experts live here. It is data, not an attribute: expert-parallel ranks share one graph.
    ``before_gate_up`` and ``before_down`` are where a reference rounds what meets quantized weights; they leave no trace.
    """

    def __init__(self, config: ModelConfig, shape: RankShape):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(shape.experts, 2 * shape.intermediate, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(shape.experts, config.hidden_size, shape.intermediate))
        self.expert_ids = nn.Buffer(torch.empty(shape.experts, dtype=torch.int64))
        self.before_gate_up: Callable[[torch.Tensor], torch.Tensor] = _unchanged
        self.before_down: Callable[[torch.Tensor], torch.Tensor] = _unchanged

    def forward(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        both = self.before_gate_up(x) @ self.gate_up_proj.transpose(1, 2)  # [E, tokens, 2F]
        half = both.shape[-1] // 2  # slices, not chunk(): that exports as a sequence
        inner = self.before_down(F.silu(both[..., :half]) * both[..., half:])
        y = inner @ self.down_proj.transpose(1, 2)  # [E, tokens, H]
        local = share.index_select(1, self.expert_ids).transpose(0, 1)  # [E, tokens]
        return (y.float() * local[..., None]).sum(0).to(x.dtype)


class SparseMoeBlock(nn.Module):
    """``MixtralSparseMoeBlock``: every rank routes all tokens and adds its experts' part; the all-reduce completes it."""

    def __init__(self, config: ModelConfig, shape: RankShape, mode: NormalizationMode, group: tuple[int, ...]):
        super().__init__()
        self.group = group
        self.gate = Router(config, mode)
        self.experts = Experts(config, shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        return all_reduce(self.experts(tokens, self.gate(tokens)), self.group).view(x.shape)


class DecoderLayer(nn.Module):
    """``MixtralDecoderLayer``."""

    def __init__(self, config: ModelConfig, shape: RankShape, mode: NormalizationMode, group: tuple[int, ...]):
        super().__init__()
        self.self_attn = Attention(config, shape, group)
        self.mlp = SparseMoeBlock(config, shape, mode, group)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], position_ids: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, Cache]:
        attended, cache = self.self_attn(self.input_layernorm(x), rope, position_ids, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class VocabParallelEmbedding(nn.Module):
    """The rank's rows of the embedding; ids of other ranks' rows contribute zeros to the sum. ``[B, S] -> [B, S, H]``."""

    def __init__(self, rows: int, hidden: int, group: tuple[int, ...]):
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(rows, hidden))
        self.first_row = nn.Buffer(torch.empty((), dtype=torch.int64))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if len(self.group) == 1:
            return F.embedding(input_ids, self.weight)
        row = input_ids - self.first_row
        mine = (row >= 0) & (row < self.weight.shape[0])
        rows = F.embedding(torch.where(mine, row, 0), self.weight)
        return all_reduce(rows * mine[..., None].to(rows.dtype), self.group)


class VocabParallelHead(nn.Module):
    """The rank's rows of the head, gathered to logits over the true vocabulary: ``[B, S, H] -> [B, S, vocab]``."""

    def __init__(self, config: ModelConfig, rows: int, group: tuple[int, ...]):
        super().__init__()
        self.vocab_size, self.group = config.vocab_size, group
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return all_gather(F.linear(x, self.weight), self.group)[..., : self.vocab_size]


class Stage(nn.Module):
    """``MixtralModel``, the layers of one pipeline stage; the last one holds ``norm``, for the caller to apply."""

    def __init__(
        self,
        config: ModelConfig,
        mapping: Mapping,
        rank: int,
        mode: NormalizationMode,
        dtype: torch.dtype,
        layers: range,
    ):
        super().__init__()
        shape, group = rank_shape(config, mapping), mapping.tp_group(rank)
        if mapping.is_first_stage(rank):
            self.embed_tokens = VocabParallelEmbedding(shape.vocab, config.hidden_size, group)
        self.rotary_emb = RotaryEmbedding(config, dtype)
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config, shape, mode, group) for i in layers})
        if mapping.is_last_stage(rank):
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, caches: list[Cache]
    ) -> tuple[torch.Tensor, list[Cache]]:
        if hasattr(self, "embed_tokens"):
            x = self.embed_tokens(x)
        rope = self.rotary_emb(position_ids)
        present = []
        for layer, cache in zip(self.layers.values(), caches, strict=True):
            x, cache = layer(x, rope, position_ids, cache)
            present.append(cache)
        return x, present


class RankModule(nn.Module):
    """``MixtralForCausalLM``, one rank of it.

    ``forward(x, position_ids, last_token_ids, caches)``:
    ``x`` is ``input_ids [B, S]`` int64 on the first stage, else ``hidden_states [B, S, H]``; ``position_ids [B, S]`` int64
    are the cache slots the tokens are written to; ``last_token_ids [B]`` int64 is the index in S of each sequence's last
    token, or None for the logits of all tokens; ``caches`` are (key, value) ``[B, K, T, D]`` of each local layer.
    ``layers`` (default: all of the rank's stage) are the layers it holds.
    Returns logits ``[B, vocab]`` (``[B, S, vocab]`` for all) on the last stage, else hidden states ``[B, S, H]``; and the
    updated caches.
    """

    def __init__(
        self,
        config: ModelConfig,
        mapping: Mapping,
        rank: int,
        dtype: torch.dtype = torch.float32,
        mode: NormalizationMode = NormalizationMode.RENORMALIZE,
        layers: range | None = None,
    ):
        super().__init__()
        layers = mapping.layers(rank, config.num_hidden_layers) if layers is None else layers
        self.model = Stage(config, mapping, rank, mode, dtype, layers)
        if mapping.is_last_stage(rank):
            rows = rank_shape(config, mapping).vocab
            self.lm_head = VocabParallelHead(config, rows, mapping.tp_group(rank))
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(False)

    def forward(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        last_token_ids: torch.Tensor | None,
        caches: list[Cache],
    ) -> tuple[torch.Tensor, list[Cache]]:
        x, present = self.model(x, position_ids, caches)
        if not hasattr(self, "lm_head"):
            return x, present
        if last_token_ids is None:
            return self.lm_head(self.model.norm(x)), present
        index = last_token_ids[:, None, None].expand(-1, 1, x.shape[-1])
        return self.lm_head(self.model.norm(x.gather(1, index)))[:, 0], present
