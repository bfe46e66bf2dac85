"""Codes that a checkpoint holds, put together: joined, stacked, and what does not go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from readers import ArrayReader

from moecompiler.errors import UserError
from moecompiler.held_codes import held_codes
from moecompiler.materializing import Materializer
from moecompiler.quantization.arithmetic import dequantize, quantize
from moecompiler.quantization.schemes import INT8, QuantizedTensor, WeightScheme, int4
from moecompiler.quantization.slicing import Axis, cut
from moecompiler.weights import Part, Piece, Quantized, Recipe, Shape, joined, whole

ORDERED = replace(int4(16), act_order=True)
WEIGHTS = np.random.default_rng(0).standard_normal((2, 8, 32)).astype(np.float32)


class Held:
    """A ``CodesReader`` over tensors ``[out, in]``."""

    def __init__(self, tensors: Mapping[str, QuantizedTensor], *, act_order: bool = False):
        self.tensors, self.act_order = tensors, act_order

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        raise AssertionError("codes are wanted, not numbers")

    def scheme(self, name: str) -> WeightScheme | None:
        return replace(self.tensors[name].scheme, act_order=self.act_order)

    def read_codes(self, name: str, start: Shape, shape: Shape) -> QuantizedTensor:
        part = cut(self.tensors[name], Axis.OUT, start[0], start[0] + shape[0], name)
        return part if shape[1] == part.shape[1] else cut(part, Axis.IN, start[1], start[1] + shape[1], name)


def sources(dtype: str = "float32") -> list[Recipe]:
    return [whole(name, dtype, (8, 32)) for name in ("a", "b")]


@pytest.mark.parametrize("scheme", [INT8, int4(16), int4(None), int4(16, symmetric=False)], ids=str)
def test_joined_and_stacked(scheme: WeightScheme) -> None:
    reader = Held({name: quantize(weight, scheme, "float32") for name, weight in zip("ab", WEIGHTS, strict=True)})
    numbers = [dequantize(tensor) for tensor in reader.tensors.values()]
    below = held_codes(joined(sources(), 0), scheme, reader)
    assert below is not None
    np.testing.assert_array_equal(dequantize(below), np.concatenate(numbers))
    pieces = tuple(Piece(name, (2, 16), (4, 16), (index, 0, 0), (0, 1, 2)) for index, name in enumerate("ab"))
    boxes = held_codes(Recipe("float32", (2, 4, 16), pieces), scheme, reader)
    assert boxes is not None
    np.testing.assert_array_equal(dequantize(boxes), np.stack(numbers)[:, 2:6, 16:])


def test_orders_of_features() -> None:
    """Each matrix of a stack may have its own; what is joined has one."""
    rng = np.random.default_rng(1)
    orders = [rng.permutation(32) for _ in range(2)]
    tensors = {
        name: replace(quantize(weight[:, order], int4(16), "float32"), order=order)
        for name, weight, order in zip("ab", WEIGHTS, orders, strict=True)
    }
    reader = Held(tensors, act_order=True)
    pieces = tuple(Piece(name, (0, 0), (8, 32), (index, 0, 0), (0, 1, 2)) for index, name in enumerate("ab"))
    stack = Recipe("float32", (2, 8, 32), pieces)
    made = Recipe("float32", stack.shape, quantized=Quantized(stack, ORDERED, Part.WEIGHT))
    expected = np.stack([dequantize(each) for each in tensors.values()])
    np.testing.assert_array_equal(Materializer(reader).tensor(made), expected)
    positions = Recipe("int64", (2, 32), quantized=Quantized(stack, ORDERED, Part.POSITIONS))
    np.testing.assert_array_equal(Materializer(reader).tensor(positions), np.argsort(orders, axis=-1))
    with pytest.raises(
        UserError, match=r"^b: has its input features in another order than the weights that it is joined"
    ):
        held_codes(joined(sources(), 0), ORDERED, reader)


def test_floats_have_their_own_order() -> None:
    reader = ArrayReader({"a": WEIGHTS[0]})
    assert held_codes(sources()[0], ORDERED, reader) is None
    positions = Recipe("int64", (1, 32), quantized=Quantized(sources()[0], ORDERED, Part.POSITIONS))
    np.testing.assert_array_equal(Materializer(reader).tensor(positions), [np.arange(32)])


def test_what_does_not_fit() -> None:
    tensors = {"a": quantize(WEIGHTS[0], int4(16), "float32"), "b": quantize(WEIGHTS[1], INT8, "float32")}
    with pytest.raises(UserError, match=r"^b: is int8 per channel in the checkpoint, and int4 per block 16 is wanted$"):
        held_codes(joined(sources(), 0), int4(16), Held(tensors))
    huge = Held({"a": quantize(WEIGHTS[0] * np.float32(1e7), int4(16), "float32")})
    with pytest.raises(OverflowError, match=r"^a: holds scales beyond float16's range; use --dtype bfloat16$"):
        held_codes(sources("float16")[0], int4(16), huge)
    with pytest.raises(ValueError, match="codes are not transposed"):
        held_codes(sources()[0].transposed((1, 0)), INT8, Held({"a": tensors["b"]}))
