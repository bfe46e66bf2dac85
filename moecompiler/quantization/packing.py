"""4-bit codes side by side: in bytes as ONNX has them, and in 32-bit words as published checkpoints do.

A code is here its 4 bits as uint8, 0 to 15; ``signed`` and ``less_eight`` say what int8 -8 to 7 these stand for.
"""

from __future__ import annotations

import numpy as np

WORD = 8  # codes in 32 bits

# nibble i of a word, from its low end, holds element order[i] of eight
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
# AutoAWQ 0.2.9, awq/modules/linear/gemm.py, WQLinear_GEMM.from_linear: order_map
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_bytes(codes: np.ndarray) -> np.ndarray:
    """uint8 or int8 ``[..., n]`` → uint8 ``[..., n / 2]``, the first of two in the low nibble.

    ONNX's order for INT4, UINT4 and FLOAT4E2M1 (``TensorProto.raw_data``), and ModelOpt's for NVFP4 (0.47,
    torch/quantization/qtensor/nvfp4_tensor.py). Raises: ValueError where n is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} codes do not fill whole bytes")
    nibbles = codes.view(np.uint8) & np.uint8(0x0F)
    return nibbles[..., ::2] | nibbles[..., 1::2] << np.uint8(4)


def unpack_bytes(packed: np.ndarray) -> np.ndarray:
    """uint8 ``[..., n / 2]`` → uint8 ``[..., n]``: what ``pack_bytes`` packed."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    codes[..., ::2] = packed & np.uint8(0x0F)
    codes[..., 1::2] = packed >> np.uint8(4)
    return codes


def pack_words(codes: np.ndarray, order: tuple[int, ...] = IN_ORDER) -> np.ndarray:
    """uint8 ``[..., n]`` → int32 ``[..., n / 8]``. Raises: ValueError where n is no multiple of 8."""
    if codes.shape[-1] % WORD:
        raise ValueError(f"{codes.shape[-1]} codes do not fill whole words")
    eights = codes.reshape(*codes.shape[:-1], -1, WORD)[..., order]
    return np.ascontiguousarray(pack_bytes(eights)).view("<i4")[..., 0]


def unpack_words(words: np.ndarray, order: tuple[int, ...] = IN_ORDER) -> np.ndarray:
    """int32 ``[..., n / 8]`` → uint8 ``[..., n]``: what ``pack_words`` packed."""
    nibbles = unpack_bytes(np.ascontiguousarray(words, "<i4")[..., None].view(np.uint8))
    if order != IN_ORDER:
        nibbles = nibbles[..., np.argsort(order)]
    return nibbles.reshape(*words.shape[:-1], -1)


def signed(codes: np.ndarray) -> np.ndarray:
    """Bits of two's complement → int8 -8 to 7: what ``pack_bytes`` made of int8."""
    return ((codes ^ np.uint8(8)).view(np.int8) - np.int8(8)).astype(np.int8, copy=False)


def less_eight(codes: np.ndarray) -> np.ndarray:
    """uint8 0 to 15 with a zero point of 8 → int8 -8 to 7 without one: the same numbers."""
    return codes.view(np.int8) - np.int8(8)
