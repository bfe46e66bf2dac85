"""One layer of a Mixtral over all samples, with note taken of what meets its weights; float32.

The arithmetic is the rank module's (``model``). Attention goes sample by sample; experts go one by one over the tokens that they
get, so that no more than one expert's weights are in memory.

A sample's tokens are at positions 0, 1, …; nothing is padded, so every number that is noted belongs to a token of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import nn

from moecompiler.calibration.kept import KeptInputs
from moecompiler.calibration.states import HiddenStates
from moecompiler.calibration.statistics import Magnitudes
from moecompiler.calibration.workers import Each
from moecompiler.config import ModelConfig, NormalizationMode
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping, rank_shape
from moecompiler.model import Attention, RMSNorm, RotaryEmbedding
from moecompiler.reference import to_torch
from moecompiler.routing import route
from moecompiler.sharding import inverse_frequencies
from moecompiler.weights import Piece, Recipe, Shape, TensorReader, materialize

CHUNK = 512  # tokens that an expert works on at a time


@dataclass(frozen=True)
class Place:
    """What all layers share. ``dtype``: what weights are rounded to before they are widened to float32; ``device``: where torch
    calculates, ``"cpu"`` or ``"cuda"``."""

    config: ModelConfig
    reader: TensorReader
    dtype: str
    mode: NormalizationMode
    device: str

    def weight(self, name: str, shape: Shape) -> torch.Tensor:
        """A published tensor in float32, on the device.

        Raises: UserError where a weight does not fit the dtype.
        """
        return self.rows(name, 0, shape)

    def rows(self, name: str, first: int, shape: Shape) -> torch.Tensor:
        """As ``weight``, the box of ``shape`` that begins with row ``first``."""
        start, zeros = (first, *(0 for _ in shape[1:])), (0,) * len(shape)
        piece = Piece(name, start, shape, zeros, tuple(range(len(shape))))
        try:
            array = materialize(Recipe(self.dtype, shape, (piece,)), self.reader)
        except OverflowError as error:
            raise UserError(str(error)) from None
        return to_torch(array).to(self.device).float()


@dataclass(frozen=True)
class AttentionMagnitudes:
    """``normed``: of the input of q, k and v; ``merged``: of o_proj's input; ``keys`` (after rotary embedding) and ``values``:
    the largest magnitudes; ``routed``: of the input of router and experts."""

    normed: Magnitudes
    merged: Magnitudes
    keys: float
    values: float
    routed: Magnitudes

    def __add__(self, other: AttentionMagnitudes) -> AttentionMagnitudes:
        return AttentionMagnitudes(
            self.normed + other.normed,
            self.merged + other.merged,
            max(self.keys, other.keys),
            max(self.values, other.values),
            self.routed + other.routed,
        )


@dataclass(frozen=True)
class ExpertMagnitudes:
    """``outer``: of the input of w1 and w3; ``inner``: of w2's. ``tokens``: how many the router gave it; ``fed``: whether these
    were too few, and all tokens stand in for them."""

    outer: Magnitudes
    inner: Magnitudes
    tokens: int
    fed: bool


@dataclass(frozen=True)
class Routing:
    """Of all tokens, on the CPU: ``logits [tokens, experts]``, and which experts get a token with what weight, both
    ``[tokens, top_k]``."""

    logits: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor

    @staticmethod
    def empty(tokens: int, config: ModelConfig) -> Routing:
        top_k = config.num_experts_per_tok
        return Routing(
            torch.empty(tokens, config.num_local_experts),
            torch.empty(tokens, top_k, dtype=torch.int64),
            torch.empty(tokens, top_k),
        )


@torch.inference_mode()
def run_attention(
    place: Place, layer: int, states: HiddenStates, each: Each, kept: KeptInputs | None = None
) -> tuple[AttentionMagnitudes, Routing]:
    """Adds attention to ``states.residual``, puts what experts get into ``states.normed``, and routes; ``kept`` gets some of what
    the projections meet.

    Raises: UserError where a hidden state becomes NaN or infinite.
    """
    part = _AttentionPart(place, layer)
    routing = Routing.empty(len(states.residual), place.config)

    def one(span: slice) -> AttentionMagnitudes:
        with torch.inference_mode():  # which is each thread's own
            return part.run(states, routing, span, kept)

    found = reduce(add, each(one, states.spans))
    _check_finite(layer, found.normed, found.merged, found.routed)
    return found, routing


class _AttentionPart:
    """A layer's norms, attention and router, with their weights."""

    def __init__(self, place: Place, layer: int):
        config, prefix = place.config, f"model.layers.{layer}"
        hidden, d = config.hidden_size, config.head_dim
        self.place = place
        rows = {"q": config.num_attention_heads * d, "k": config.num_key_value_heads * d}
        rows["v"] = rows["k"]
        with torch.device("meta"):
            self.attention = Attention(config, rank_shape(config, Mapping.create()), (0,))
            self.norms = [RMSNorm(hidden, config.rms_norm_eps) for _ in range(2)]
            self.rotary = RotaryEmbedding(config, torch.float32)
        for name, count in rows.items():
            linear = getattr(self.attention, f"{name}_proj")
            linear.weight = _parameter(place.weight(f"{prefix}.self_attn.{name}_proj.weight", (count, hidden)))
        self.attention.add_module("o_proj", nn.Identity())  # what it gets is looked at first
        self.output = place.weight(f"{prefix}.self_attn.o_proj.weight", (hidden, rows["q"]))
        for norm, name in zip(self.norms, ("input_layernorm", "post_attention_layernorm"), strict=True):
            norm.weight = _parameter(place.weight(f"{prefix}.{name}.weight", (hidden,)))
        self.gate = place.weight(f"{prefix}.block_sparse_moe.gate.weight", (config.num_local_experts, hidden))
        self.rotary.inv_freq = nn.Buffer(torch.from_numpy(inverse_frequencies(config)).to(place.device))

    def run(self, states: HiddenStates, routing: Routing, span: slice, kept: KeptInputs | None) -> AttentionMagnitudes:
        config = self.place.config
        x = states.residual[span].to(self.place.device, copy=True)
        positions = torch.arange(len(x), device=x.device)[None]
        slots = x.new_zeros(1, config.num_key_value_heads, len(x), config.head_dim)
        normed = self.norms[0](x)
        merged, (keys, values) = self.attention(normed[None], self.rotary(positions), positions, (slots, slots))
        if kept is not None:
            kept.keep(span, normed, merged[0])
        x += F.linear(merged[0], self.output)
        routed = self.norms[1](x)
        logits = F.linear(routed, self.gate)
        weights, experts = route(logits, config.num_experts_per_tok, self.place.mode)
        for into, what in (
            (states.residual, x),
            (states.normed, routed),
            (routing.logits, logits),
            (routing.weights, weights),
            (routing.experts, experts),
        ):
            into[span] = what.to("cpu")
        return AttentionMagnitudes(
            Magnitudes.of(normed),
            Magnitudes.of(merged[0]),
            float(keys.abs().amax()),
            float(values.abs().amax()),
            Magnitudes.of(routed),
        )


@torch.inference_mode()
def run_expert(
    place: Place, layer: int, expert: int, states: HiddenStates, routing: Routing, least: int, each: Each
) -> ExpertMagnitudes:
    """Adds an expert's part to ``states.residual`` of the tokens that it gets.

    One that gets fewer than ``least`` tokens is fed: its statistics are those of all tokens, in means weighted by the router's
    probability, as if it were likelier to get what it was close to getting. What goes on to the next layer is unchanged by that.
    Raises: UserError where a hidden state becomes NaN or infinite.
    """
    config, prefix = place.config, f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    hidden, inner = config.hidden_size, config.intermediate_size
    w1 = place.weight(f"{prefix}.w1.weight", (inner, hidden))
    w3 = place.weight(f"{prefix}.w3.weight", (inner, hidden))
    w2 = place.weight(f"{prefix}.w2.weight", (hidden, inner))
    tokens, column = (routing.experts == expert).nonzero(as_tuple=True)
    share = routing.weights[tokens, column]

    def activations(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = states.normed[rows].to(place.device)
        return x, F.silu(F.linear(x, w1)) * F.linear(x, w3)

    def work(part: slice) -> tuple[Magnitudes, Magnitudes]:
        with torch.inference_mode():
            rows = tokens[part]
            x, between = activations(rows)
            # rows of one expert are distinct, so threads write to different ones
            states.residual[rows] += F.linear(between, w2).to("cpu") * share[part, None]
            return Magnitudes.of(x), Magnitudes.of(between)

    def feed(part: slice) -> tuple[Magnitudes, Magnitudes]:
        with torch.inference_mode():
            x, between = activations(torch.arange(part.start, part.stop))
            weights = closeness[part].to(place.device)
            return Magnitudes.of(x, weights), Magnitudes.of(between, weights)

    found = list(each(work, _chunks(len(tokens))))
    starved = len(tokens) < least
    if starved:
        likelihood = torch.log_softmax(routing.logits.double(), dim=-1)[:, expert]
        closeness = (likelihood - likelihood.max()).exp()  # 1 for the likeliest: the sum of the weights is never 0
        found = list(each(feed, _chunks(len(states.normed))))
    outer, between = (reduce(add, column) for column in zip(*found, strict=True))
    _check_finite(layer, outer, between)
    return ExpertMagnitudes(outer, between, len(tokens), starved)


def _chunks(count: int) -> list[slice]:
    return [slice(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]


def _parameter(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _check_finite(layer: int, *found: Magnitudes) -> None:
    if not all(torch.isfinite(each.sums).all() for each in found):
        raise UserError(
            f"model.layers.{layer}: its activations are NaN or infinite; look for such weights with --check_finite"
        )
