"""A rank's torch module, and what goes in and out of it, with a KV cache as engines hold it in codes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from moecompiler.model import Attention, RankModule
from moecompiler.quantization.cache import CacheQuantization, decode_cache, encode_cache
from moecompiler.quantization.encodings import widen
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.scales import positive
from moecompiler.quantization.schemes import Format

_CACHE = re.compile(r"(?:past_key_values|present)\.(\d+)\.(key|value)")
_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn")


def rounded(x: torch.Tensor, scale: float, form: Format) -> torch.Tensor:
    """What a cache of codes holds of ``x``, in its type."""
    codes = encode_cache(x.float().numpy(), scale, form)
    return torch.from_numpy(decode_cache(codes, scale, form)).to(x.dtype)


@dataclass(frozen=True)
class Held:
    """``model.Attention.held`` with a cache of codes, of these scales."""

    keys: float
    values: float
    form: Format
    fp8_context: bool

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = rounded(q, 1.0, Format.E4M3) if self.fp8_context and q.shape[2] > 1 else q
        return q, rounded(k, self.keys, self.form), rounded(v, self.values, self.form)


def rounded_shares(scores: torch.Tensor) -> torch.Tensor:
    """The softmax over the last axis of ``[B, K, G, S, T]`` as ``AttentionFp8Context`` has it."""
    scores = scores * math.log2(math.e)
    powers = torch.exp2(scores - scores.amax(-1, keepdim=True).ceil())
    taken = (256 * powers).to(torch.float8_e4m3fn).float() / 256 if scores.shape[3] > 1 else powers
    return taken / powers.sum(-1, keepdim=True)


def round_cache(module: RankModule, plan: QuantizationRecipe | None, dtype: str) -> None:
    """Has ``module`` round the keys and values that it writes, and with FP8 attention in prefill its queries and the softmax's
    shares. Graphs hold scales in ``dtype``."""
    if plan is None or plan.cache is None:
        return
    for name, part in module.named_modules():
        if isinstance(part, Attention) and (named := _ATTENTION.fullmatch(name)) is not None:
            keys, values = (_scale(plan.cache, int(named[1]), which, dtype) for which in (0, 1))
            held = Held(keys, values, plan.cache.format, plan.cache.fp8_context)
            part.held = held  # type: ignore[method-assign]
            if plan.cache.fp8_context:
                part.shares = rounded_shares  # type: ignore[method-assign]


def as_codes(plan: QuantizationRecipe | None, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """What an engine holds of the cache called ``name``, int8; other arrays, and caches of floats, as they are."""
    if plan is None or plan.cache is None or (named := _CACHE.fullmatch(name)) is None:
        return array
    return encode_cache(array, _scale(plan.cache, int(named[1]), named[2] == "value", dtype), plan.cache.format)


def as_numbers(plan: QuantizationRecipe | None, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers, float32, that an engine's codes stand for, whatever type they are given in; other arrays as they are."""
    if plan is None or plan.cache is None or (named := _CACHE.fullmatch(name)) is None:
        return array
    scale = _scale(plan.cache, int(named[1]), named[2] == "value", dtype)
    return decode_cache(np.asarray(array).astype(np.int8), scale, plan.cache.format)


def _scale(cache: CacheQuantization, layer: int, which: int, dtype: str) -> float:
    return float(widen(positive(np.array([cache.scales[layer][which]], np.float32), dtype))[0])
