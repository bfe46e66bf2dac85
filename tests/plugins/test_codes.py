"""Every byte, unpacked in PTX, is the number that it stands for: the instructions, computed in numpy."""

from __future__ import annotations

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from moecompiler.plugins.quantized import codes, vector_codes
from moecompiler.quantization.encodings import decode_e2m1

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BYTES = np.arange(256, dtype=np.uint8)


def int4(code: np.ndarray) -> np.ndarray:
    return (code.astype(np.int32) ^ 8) - 8


def run(ptx: str, words: np.ndarray, results: int) -> list[np.ndarray]:
    """``words`` uint32 are the operand behind the ``results``, which are what comes back."""
    registers: dict[str, np.ndarray] = {f"${results}": words}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(words, int(name, 0))

    def select(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
        both = np.concatenate((a[:, None].view(np.uint8), b[:, None].view(np.uint8)), 1)
        places = [int(selectors[0]) >> (4 * i) & 0xF for i in range(4)]
        assert max(places) < 8  # else the sign is repeated
        return np.ascontiguousarray(both[:, places]).view(np.uint32)[:, 0]

    def logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a)
        for case in range(8):
            if int(table[0]) >> case & 1:
                masks = (x if case & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
                result |= np.bitwise_and.reduce(list(masks))
        return result

    def on_halves(dtype: np.dtype, operation: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def computed(*operands: np.ndarray) -> np.ndarray:
            wide = [x[:, None].view(dtype).astype(np.float64) for x in operands]
            exact = operation(*wide)
            rounded = exact.astype(dtype)
            assert (rounded.astype(np.float64) == exact).all()
            return rounded.view(np.uint32)[:, 0]

        return computed

    operations: dict[str, Callable[..., np.ndarray]] = {
        "mov.b32": lambda a: a,
        "xor.b32": np.bitwise_xor,
        "and.b32": np.bitwise_and,
        "shl.b32": np.left_shift,
        "shr.u32": np.right_shift,
        "prmt.b32": select,
        "lop3.b32": logic,
        "sub.f16x2": on_halves(np.dtype(np.float16), np.subtract),
        "mul.f16x2": on_halves(np.dtype(np.float16), np.multiply),
        "fma.rn.f16x2": on_halves(np.dtype(np.float16), lambda a, b, c: a * b + c),
        "fma.rn.bf16x2": on_halves(BFLOAT16, lambda a, b, c: a * b + c),
    }
    for name, operands in re.findall(r"^\s+(\w[\w.]+) (.*);", ptx, re.MULTILINE):
        target, *sources = operands.split(", ")
        registers[target] = operations[name](*(value(source) for source in sources))
    return [registers[f"${i}"] for i in range(results)]


def test_int8() -> None:
    results = run(codes.INT8_TO_FLOAT16.value, BYTES.view(np.uint32), 2)
    numbers = np.stack(results, 1).view(np.float16).ravel()
    np.testing.assert_array_equal(numbers, BYTES.view(np.int8).astype(np.float16))


@pytest.mark.parametrize(
    ("ptx", "dtype", "decode"),
    [
        (codes.INT4_TO_FLOAT16, np.float16, int4),
        (codes.INT4_TO_BFLOAT16, BFLOAT16, int4),
        (codes.E2M1_TO_FLOAT16, np.float16, decode_e2m1),
        (codes.E2M1_TO_BFLOAT16, BFLOAT16, decode_e2m1),
    ],
)
def test_two_to_a_byte(ptx: codes.tl.constexpr, dtype: np.dtype, decode: Callable[[np.ndarray], np.ndarray]) -> None:
    results = run(ptx.value, BYTES.view(np.uint32), 4)
    for i, of_byte in enumerate((BYTES & 15, BYTES >> 4)):
        numbers = np.stack(results[2 * i : 2 * i + 2], 1).view(dtype).ravel()
        np.testing.assert_array_equal(numbers.astype(np.float32), decode(of_byte).astype(np.float32))


@pytest.mark.parametrize(
    ("ptx", "dtype", "decode"),
    [
        (codes.INT4_QUADS_TO_FLOAT16, np.float16, int4),
        (codes.INT4_QUADS_TO_BFLOAT16, BFLOAT16, int4),
        (codes.E2M1_QUADS_TO_FLOAT16, np.float16, decode_e2m1),
        (codes.E2M1_QUADS_TO_BFLOAT16, BFLOAT16, decode_e2m1),
    ],
)
def test_four_to_16_bits(ptx: codes.tl.constexpr, dtype: np.dtype, decode: Callable[[np.ndarray], np.ndarray]) -> None:
    quads = np.arange(1 << 16, dtype=np.uint16)
    results = run(ptx.value, quads.view(np.uint32), 4)
    for i, words in enumerate(results):
        numbers = np.ascontiguousarray(words).view(dtype)
        expected = decode(((quads >> (4 * i)) & 15).astype(np.uint8))
        np.testing.assert_array_equal(numbers.astype(np.float32), expected.astype(np.float32))


def test_four_to_16_bits_for_vectors() -> None:
    """But for what they have in common."""
    quads = np.arange(1 << 16, dtype=np.uint16)
    raised = run(vector_codes.INT4_QUADS_RAISED.value, quads.view(np.uint32), 8)
    small = run(vector_codes.E2M1_QUADS_SMALL.value, quads.view(np.uint32), 4)
    for i in range(4):
        code = ((quads >> (4 * i)) & 15).astype(np.uint8)
        numbers = np.stack(raised[2 * i : 2 * i + 2], 1).view(np.float32).ravel()
        np.testing.assert_array_equal(128 * numbers - 136, int4(code))
        halves = np.ascontiguousarray(small[i]).view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(halves * 2**14, decode_e2m1(code))
