"""A KV cache held as codes: which format, and the scales of each layer's keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moecompiler.quantization.encodings import decode_e4m3, encode_e4m3, encode_integer
from moecompiler.quantization.schemes import Format

CACHE_FORMATS = {"fp8": Format.E4M3, "int8": Format.INT8}
"""As ``--kv_cache_dtype`` names them."""


@dataclass(frozen=True)
class CacheQuantization:
    """``scales``: of the keys and of the values of every layer of the model, ``code = number / scale``. ``fp8_context``: where a
    step has several tokens, queries and the softmax's shares are rounded to E4M3 too."""

    format: Format
    scales: tuple[tuple[float, float], ...]
    fp8_context: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format.value,
            "scales": [list(each) for each in self.scales],
            "fp8_context": self.fp8_context,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> CacheQuantization:
        scales = tuple((float(keys), float(values)) for keys, values in data["scales"])
        return CacheQuantization(Format(data["format"]), scales, data["fp8_context"])

    def __str__(self) -> str:
        name = next(name for name, each in CACHE_FORMATS.items() if each is self.format)
        return f"{name}, FP8 attention in prefill" if self.fp8_context else name


def encode_cache(numbers: np.ndarray, scale: float, form: Format) -> np.ndarray:
    """Floats → the codes that graphs hold, int8 of the same shape: integers from -127 to 127, or E4M3's bytes. To the nearest,
    ties to even, saturating; ``scale`` divides in float32."""
    quotients = np.asarray(numbers, np.float32) / np.float32(scale)
    if form is Format.E4M3:
        return encode_e4m3(quotients).view(np.int8)
    codes = np.empty(quotients.shape, np.int8)
    encode_integer(quotients, codes, -127, 127)
    return codes


def decode_cache(codes: np.ndarray, scale: float, form: Format) -> np.ndarray:
    """int8 codes as graphs hold them → float32 of the same shape."""
    steps = decode_e4m3(codes) if form is Format.E4M3 else codes.astype(np.float32)
    return np.asarray(steps * np.float32(scale), np.float32)
