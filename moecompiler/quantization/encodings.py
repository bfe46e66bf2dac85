"""Numbers of few bits: what each code stands for, and which code a number becomes.

Every rounding is to the nearest, ties to even, and saturates. The formats: E4M3 ("E4M3FN") of *OCP 8-bit Floating Point
Specification (OFP8)*, 1.0; E2M1 of *OCP Microscaling Formats (MX)*, 1.0, which NVFP4 takes over; two's complement and unsigned
integers. What saturates and what becomes of NaN is as in ONNX's ``Cast`` with ``saturate=1`` and ``QuantizeLinear``.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

New = Callable[..., np.ndarray]  # memory, asked for as by ``np.empty(shape, dtype)``

E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # its smallest positive number
E2M1_MAX = 6.0
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_E4M3_NAN = 0x7F
_E4M3_LARGEST = 0x7E
_SHORT = 64  # elements along an axis
_BLOCK = 1 << 14  # elements whose intermediate results stay in a core's cache, and out of the system's allocator


def widen(values: np.ndarray, new: New = np.empty) -> np.ndarray:
    """float16, bfloat16 or float32 as a float32 array in memory from ``new``, exactly. Raises: TypeError for other dtypes."""
    if values.dtype == BFLOAT16:  # its bits are the upper half of a float32's; several times as fast as ml_dtypes' cast
        bits = new(values.shape, np.uint32)
        bits[...] = values.view(np.uint16)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    if values.dtype == np.float16:
        return _widen_half(values, new)
    if values.dtype == np.float32:
        wide = new(values.shape, np.float32)
        wide[...] = values
        return wide
    raise TypeError(f"{values.dtype} is no float16, bfloat16 or float32")


def _widen_half(values: np.ndarray, new: New) -> np.ndarray:
    """Sign, exponent and mantissa are put where float32 has them, which leaves the exponent too small by 127 - 15; multiplying by
    that power of two mends it, subnormal numbers included. Infinity and NaN come out as 2^16 and more: numpy casts them."""
    bits = new(values.shape, np.int32)
    bits[...] = values.view(np.int16)
    np.left_shift(bits, 13, out=bits)  # the sign fills all the upper bits
    np.bitwise_and(bits, np.uint32(0x8FFFE000).view(np.int32), out=bits)
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    if wide.max(initial=0) < 2**16 and wide.min(initial=0) > -(2**16):
        return wide
    return values.astype(np.float32)


def largest_magnitude(values: np.ndarray, new: New = np.empty) -> np.ndarray:
    """max(abs(values)) along the last axis, as float32; 0 where there is nothing, NaN or infinity where ``values`` holds one.

    By the bits: without its sign, a float's bits as an integer have the float's order, and numpy is slow at 16-bit floats.
    """
    unsigned = np.dtype(f"u{values.dtype.itemsize}").type
    without_sign = new(values.shape, unsigned)
    np.bitwise_and(values.view(unsigned), unsigned(np.iinfo(unsigned).max >> 1), out=without_sign)
    return widen(extreme(np.maximum, without_sign).view(values.dtype))


def extreme(which: np.ufunc, values: np.ndarray) -> np.ndarray:
    """``np.maximum`` or ``np.minimum`` along the last axis, and of 0. numpy is slow along short axes: pairs go first there."""
    while 0 < values.shape[-1] <= _SHORT and values.shape[-1] % 2 == 0:
        values = which(values[..., ::2], values[..., 1::2])
    return np.asarray(which.reduce(values, axis=-1, initial=0), values.dtype)


def encode_e4m3(values: np.ndarray) -> np.ndarray:
    """float32 → ``float8_e4m3fn`` of the same shape. Beyond ±448, infinity too: ±448. NaN stays NaN."""
    return _in_blocks(_e4m3_bits, values).view(E4M3)


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """``float8_e4m3fn``, or its bits as uint8 → float32 of the same shape."""
    every = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    return every[codes.view(np.uint8)]


def encode_e2m1(values: np.ndarray) -> np.ndarray:
    """float32 → uint8 of the same shape, the code in the low 4 bits. Beyond ±6, infinity too: ±6.

    Raises: ValueError for NaN, which E2M1 has no code for.
    """
    if np.isnan(values.max(initial=0)):
        raise ValueError("NaN has no E2M1 code")
    return _in_blocks(_e2m1_bits, values)


def decode_e2m1(codes: np.ndarray) -> np.ndarray:
    """uint8 codes 0 to 15 → float32 of the same shape."""
    every = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([every, -every])[codes]


def encode_integer(values: np.ndarray, out: np.ndarray, low: int, high: int) -> None:
    """float32 → integers from ``low`` to ``high``, into ``out``. ``values`` is overwritten. NaN must not occur."""
    np.rint(values, out=values)
    np.clip(values, low, high, out=values)
    np.copyto(out, values, casting="unsafe")


def _in_blocks(encode: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    codes = np.empty(flat.shape, np.uint8)
    for at in range(0, flat.size, _BLOCK):
        codes[at : at + _BLOCK] = encode(flat[at : at + _BLOCK])
    return codes.reshape(values.shape)


def _e2m1_bits(values: np.ndarray) -> np.ndarray:
    """float32 → uint8. Midway between neighbours, the one with the even code."""
    magnitude = np.abs(values)
    codes = (magnitude > np.float32(0.25)).view(np.uint8)
    codes += (magnitude >= np.float32(0.75)).view(np.uint8)
    codes += (magnitude > np.float32(1.25)).view(np.uint8)
    codes += (magnitude >= np.float32(1.75)).view(np.uint8)
    codes += (magnitude > np.float32(2.5)).view(np.uint8)
    codes += (magnitude >= np.float32(3.5)).view(np.uint8)
    codes += (magnitude > np.float32(5)).view(np.uint8)
    codes |= np.signbit(values).view(np.uint8) << np.uint8(3)
    return codes


def _e4m3_bits(values: np.ndarray) -> np.ndarray:
    """float32 → uint8.

    Normal numbers: half a unit is added to float32's bits, less what makes ties even, and the bits that do not fit are dropped;
    a carry runs into the exponent, as it should. Subnormal ones are multiples of 2^-9: a float32 whose last place is that is
    added, and the addition rounds.
    """
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    code = magnitude >> np.uint32(20)
    code &= np.uint32(1)  # whether a tie has to go up
    code += magnitude
    code += np.uint32((1 << 19) - 1)
    code >>= np.uint32(20)
    code -= np.uint32((127 - 7) << 3)  # the exponent's bias
    adding = np.float32(2.0 ** (23 - 9))
    small = (magnitude.view(np.float32) + adding).view(np.uint32)
    small -= adding.view(np.uint32)
    np.copyto(code, small, where=magnitude < np.float32(2.0**-6).view(np.uint32))
    np.minimum(code, np.uint32(_E4M3_LARGEST), out=code)
    np.copyto(code, np.uint32(_E4M3_NAN), where=magnitude > np.float32(np.inf).view(np.uint32))
    code |= (bits >> np.uint32(24)) & np.uint32(0x80)
    return code.astype(np.uint8)
