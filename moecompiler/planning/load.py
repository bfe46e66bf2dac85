"""What is asked of engines, and what one rank then holds in memory. All sizes are in bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from moecompiler.config import ModelConfig
from moecompiler.mapping import Mapping, rank_shape
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.schemes import WeightScheme
from moecompiler.weights import NUMPY_DTYPES, Shape

RUNTIME_BYTES = 1 << 30  # CUDA's context, libraries' own memory, kernels: an assumption


@dataclass(frozen=True)
class Load:
    """What engines are to hold. ``recipe``: which weights are codes; ``cache_bytes``: of a number in the KV cache; ``batch``:
    sequences; ``slots``: tokens of a sequence that the cache holds; ``step_tokens``: the most tokens of a step."""

    dtype: str = "bfloat16"
    recipe: QuantizationRecipe | None = None
    cache_bytes: int = 2
    batch: int = 8
    slots: int = 2048
    step_tokens: int = 2048

    @property
    def itemsize(self) -> int:
        return NUMPY_DTYPES[self.dtype].itemsize

    def scheme_of(self, name: str) -> WeightScheme | None:
        return self.recipe.scheme_of(name) if self.recipe is not None else None


@dataclass(frozen=True)
class Memory:
    """What a rank holds; ``other``: norms and router. ``workspace``: activations of the largest step, estimated, and
    ``RUNTIME_BYTES``."""

    attention: int
    experts: int
    embedding: int
    head: int
    other: int
    cache: int
    workspace: int

    @property
    def weights(self) -> int:
        return self.attention + self.experts + self.embedding + self.head + self.other

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))


def matrix_bytes(shape: Shape, itemsize: int, scheme: WeightScheme | None) -> int:
    """A weight ``[..., out, in]``, with scales and zero points as ``quantize-weights`` keeps them: scales by row or by block.

    Raises: UserError where blocks do not fill the rows.
    """
    count, rows = prod(shape), prod(shape[:-1])
    if scheme is None:
        return count * itemsize
    scales = rows if scheme.block_size is None else prod(scheme.scale_shape(shape))
    codes = count * scheme.format.bits // 8
    if scheme.two_level:
        return codes + scales + 4 * rows
    return codes + scales * (itemsize + (not scheme.symmetric))


def attention_bytes(config: ModelConfig, mapping: Mapping, load: Load, layer: int) -> int:
    """A rank's share of a layer's projections."""
    shape, hidden = rank_shape(config, mapping), config.hidden_size
    heads, kv_heads = shape.heads * config.head_dim, shape.kv_heads * config.head_dim
    sizes: dict[str, Shape] = {
        "q": (heads, hidden),
        "k": (kv_heads, hidden),
        "v": (kv_heads, hidden),
        "o": (hidden, heads),
    }
    return sum(
        matrix_bytes(size, load.itemsize, load.scheme_of(f"model.layers.{layer}.self_attn.{name}_proj"))
        for name, size in sizes.items()
    )


def expert_bytes(config: ModelConfig, mapping: Mapping, load: Load, layer: int) -> int:
    """A rank's share of one of its experts; a layer's experts are quantized alike."""
    inner, hidden = rank_shape(config, mapping).intermediate, config.hidden_size
    named = f"model.layers.{layer}.block_sparse_moe.experts.0"
    gate_up = matrix_bytes((2 * inner, hidden), load.itemsize, load.scheme_of(f"{named}.w1"))
    return gate_up + matrix_bytes((hidden, inner), load.itemsize, load.scheme_of(f"{named}.w2"))


def cache_bytes_per_token(config: ModelConfig, mapping: Mapping, load: Load) -> int:
    """Keys and values of one token in one layer, a rank's heads."""
    return 2 * rank_shape(config, mapping).kv_heads * config.head_dim * load.cache_bytes


def rank_memory(config: ModelConfig, mapping: Mapping, rank: int, load: Load) -> Memory:
    """Raises: UserError where a scheme's blocks do not fill a rank's rows."""
    shape, hidden, size = rank_shape(config, mapping), config.hidden_size, load.itemsize
    layers = mapping.layers(rank, config.num_hidden_layers)
    first, last = mapping.is_first_stage(rank), mapping.is_last_stage(rank)
    table = (shape.vocab, hidden)
    norms = (2 * len(layers) + last) * hidden * size
    return Memory(
        attention=sum(attention_bytes(config, mapping, load, layer) for layer in layers),
        experts=sum(shape.experts * expert_bytes(config, mapping, load, layer) for layer in layers),
        embedding=prod(table) * size * first,
        head=matrix_bytes(table, size, load.scheme_of("lm_head")) * last,
        other=norms + len(layers) * config.num_local_experts * hidden * size,
        cache=len(layers) * load.batch * load.slots * cache_bytes_per_token(config, mapping, load),
        workspace=RUNTIME_BYTES + activation_bytes(config, mapping, load),
    )


def activation_bytes(config: ModelConfig, mapping: Mapping, load: Load) -> int:
    """An estimate for the largest step, as if nothing shared memory within a layer: the residual stream four times over, queries,
    keys, values and the heads' output, and what the MoE makes of all tokens' choices if they are all this rank's; and two
    copies of the float32 logits of ``batch`` tokens."""
    shape, hidden = rank_shape(config, mapping), config.hidden_size
    attention = (2 * shape.heads + 2 * shape.kv_heads) * config.head_dim
    moe = config.num_experts_per_tok * (2 * hidden + 3 * shape.intermediate)
    return load.step_tokens * (4 * hidden + attention + moe) * load.itemsize + 8 * load.batch * config.vocab_size
