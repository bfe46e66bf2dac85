"""Published quantized checkpoints: which of their linear layers are quantized, and each of these as a ``QuantizedTensor``.
Numbers stay what they are: nothing is quantized anew."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping as RankMapping
from moecompiler.quantization.encodings import widen
from moecompiler.quantization.published_config import Layout, PublishedConfig
from moecompiler.quantization.published_layouts import READERS, Taker, Tensors, tensors_of
from moecompiler.quantization.recipe import QuantizationRecipe, Rule, default_recipe
from moecompiler.quantization.schemes import Format, QuantizedTensor
from moecompiler.weights import Shape

LISTED = 8  # how many names a message gives


@dataclass(frozen=True, eq=False)
class PublishedLinear:
    """``input_scale``: the static scale of the activations that meet the weight, where the checkpoint has one."""

    weight: QuantizedTensor
    input_scale: float | None = None


def linear_stacks(model: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """The names of all linear layers that may be quantized, attention's and the experts'; together, what a rank holds as one
    tensor and is to be stored alike: each of attention's, all experts' w1 and w3, and all their w2."""
    stacks: list[tuple[str, ...]] = []
    for layer in range(model.num_hidden_layers):
        prefix, count = f"model.layers.{layer}", range(model.num_local_experts)
        stacks += [(f"{prefix}.self_attn.{part}_proj",) for part in "qkvo"]
        for parts in (("w1", "w3"), ("w2",)):
            stacks.append(tuple(f"{prefix}.block_sparse_moe.experts.{e}.{w}" for e in count for w in parts))
    return tuple(stacks)


def quantized_layers(config: PublishedConfig, names: Collection[str], model: ModelConfig, where: str) -> frozenset[str]:
    """The linear layers that are quantized; the others have a plain ``weight``. ``names``: of all tensors there are.

    Raises: UserError that begins with ``where``: a tensor is missing, none is quantized, or a layer's experts are not all
    stored alike.
    """
    found = set()
    for stack in linear_stacks(model):
        quantized = [name for name in stack if _is_quantized(config, names, name, where)]
        if quantized and len(quantized) < len(stack):
            plain = [name for name in stack if name not in quantized]
            raise UserError(
                f"{where}: mixed formats across experts: {_listed(plain)} not quantized, {quantized[0]} is;"
                " a layer's experts must be stored alike"
            )
        found.update(quantized)
    if not found:
        raise UserError(f"{where}: says {config.method}, but none of the model's linear layers is quantized")
    return frozenset(found)


def published_recipe(config: PublishedConfig, quantized: Collection[str], model: ModelConfig) -> QuantizationRecipe:
    """What the checkpoint holds as codes, as a recipe: its layers ``quantized``, and no others."""
    kept = [name for stack in linear_stacks(model) for name in stack if name not in quantized]
    return default_recipe(config.held_scheme).overridden(QuantizationRecipe(tuple(Rule(name, None) for name in kept)))


def check_parallel(recipe: QuantizationRecipe, model: ModelConfig, mapping: RankMapping, where: str) -> None:
    """Raises UserError where ranks would have to split features that are in another order than they have."""
    schemes = {recipe.scheme_of(name) for stack in linear_stacks(model) for name in stack}
    if mapping.tp_size > 1 and any(scheme is not None and scheme.act_order for scheme in schemes):
        raise UserError(
            f"{where}: quantized with act-order, whose groups cannot be split over --tp_size {mapping.tp_size}; use"
            " --tp_size 1 (with --pp_size), or a checkpoint without act-order"
        )


def read_linear(config: PublishedConfig, tensors: Tensors, linear: str, shape: Shape) -> PublishedLinear:
    """The layer called ``linear`` (``model.layers.0.self_attn.q_proj``), whose weight must be of ``shape`` ``[out, in]``.

    Raises: UserError that names the tensor, where one is missing or of the wrong shape or dtype, where scales are not
    positive and finite, and where the groups do not divide the input features or are not of one size.
    """
    config.scheme.scale_shape(shape, linear)
    take = Taker(tensors, linear, shape)
    weight = READERS[config.layout](config, take)
    _check_scales(f"{linear}: its scales", weight.scales)
    if weight.global_scale is not None:
        suffix = "weight_global_scale" if config.layout is Layout.CT_NVFP4 else "weight_scale_2"
        _check_scales(f"{linear}.{suffix}", weight.global_scale)
    if weight.scheme.format is Format.E4M3 and ((weight.codes.view(np.uint8) & 0x7F) == 0x7F).any():
        raise UserError(f"{linear}.weight: holds NaN; the checkpoint is broken")
    static = config.activations == "static" and config.layout is not Layout.CT_NVFP4  # whose are no scales of 8 bits
    return PublishedLinear(weight, _scalar(take, "input_scale") if static else None)


def read_input_scale(config: PublishedConfig, tensors: Tensors, linear: str) -> float | None:
    """The static scale of the activations that meet the FP8 weight of ``linear``; ``None`` where the checkpoint has none.

    Raises: UserError where it is missing, or not positive and finite.
    """
    static = config.activations == "static" and config.scheme.format is Format.E4M3
    return _scalar(Taker(tensors, linear, ()), "input_scale") if static else None


def read_kv_scales(tensors: Tensors, attention: str) -> tuple[float, float] | None:
    """The scales of the FP8 cache's keys and values of ``model.layers.0.self_attn``; ``None`` where it has none.

    ``k_proj.k_scale`` and ``v_proj.v_scale`` in ModelOpt's checkpoints, ``k_scale`` and ``v_scale`` in compressed-tensors'.
    Raises: UserError where one is missing, or not positive and finite.
    """
    for keys, values in (("k_proj.k_scale", "v_proj.v_scale"), ("k_scale", "v_scale")):
        if f"{attention}.{keys}" in tensors or f"{attention}.{values}" in tensors:
            take = Taker(tensors, attention, ())
            return _scalar(take, keys), _scalar(take, values)
    return None


def _is_quantized(config: PublishedConfig, names: Collection[str], linear: str, where: str) -> bool:
    required = tensors_of(config)
    missing = [suffix for suffix in required if f"{linear}.{suffix}" not in names]
    if f"{linear}.weight" in names and set(missing) == set(required) - {"weight"}:
        return False
    if missing:
        raise UserError(
            f"{where}: says {config.method}, but {linear} has no {' and no '.join(missing)}; download the checkpoint again"
        )
    return True


def _scalar(take: Taker, suffix: str) -> float:
    value = take.one(suffix)
    _check_scales(f"{take.linear}.{suffix}", value)
    return float(value)


def _check_scales(what: str, scales: np.ndarray) -> None:
    wide = scales.astype(np.float32) if scales.dtype.itemsize == 1 else widen(scales)
    for kind, wrong in (("NaN or infinity", ~np.isfinite(wide)), ("zero or below", wide <= 0)):
        if wrong.any():
            raise UserError(f"{what}: {int(wrong.sum())} of {scales.size} are {kind}; the checkpoint is broken")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
