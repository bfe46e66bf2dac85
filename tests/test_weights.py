"""Recipes: what they describe is what numpy makes of the same boxes, transposed and stored in whatever way."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import ArrayReader

from moecompiler.weights import Piece, Recipe, Shape, materialize

SETTINGS = settings(max_examples=100, deadline=None)
Made = tuple[Recipe, ArrayReader, np.ndarray]


def inverse(perm: Shape) -> Shape:
    return tuple(int(axis) for axis in np.argsort(perm))


@st.composite
def made_recipes(draw: st.DrawFn) -> Made:
    """A recipe of pieces that lie behind one another on the first axis, with gaps; its sources; the tensor it describes."""
    rest = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    rank = 1 + len(rest)
    sources: dict[str, np.ndarray] = {}
    pieces, rows = [], []
    for index in range(draw(st.integers(0, 4))):
        extent = (draw(st.integers(1, 3)), *rest)
        perm = tuple(draw(st.permutations(range(rank))))
        box = tuple(extent[axis] for axis in inverse(perm))
        start = tuple(draw(st.integers(0, 2)) for _ in box)
        whole = tuple(a + n + draw(st.integers(0, 2)) for a, n in zip(start, box, strict=True))
        source = np.arange(1, 1 + np.prod(whole), dtype=np.float32).reshape(whole) + 1000 * index
        block = source[tuple(slice(a, a + n) for a, n in zip(start, box, strict=True))].transpose(perm)
        at = (sum(len(row) for row in rows), *(0,) * (rank - 1))
        if box[0] == 1 and rank > 1 and draw(st.booleans()):  # a box may lack leading axes of size 1
            source, start, box = source[start[0]], start[1:], box[1:]
        sources[f"t{index}"] = source
        pieces.append(Piece(f"t{index}", start, box, at, perm))
        rows.append(block)
        if draw(st.booleans()):
            rows.append(np.zeros((1, *rest), np.float32))
    rows = rows or [np.zeros((2, *rest), np.float32)]
    wanted = np.concatenate(rows)
    shuffled = tuple(draw(st.permutations(pieces)))
    return Recipe("float32", wanted.shape, shuffled), ArrayReader(sources), wanted


@SETTINGS
@given(made_recipes())
def test_materialize(made: Made) -> None:
    """Pieces land where they belong, in whatever order they are listed; the rest is zeros."""
    recipe, sources, wanted = made
    array = materialize(recipe, sources)
    np.testing.assert_array_equal(array, wanted)
    assert array.flags.c_contiguous
    assert array.dtype == np.float32
    assert recipe.nbytes == array.nbytes


@SETTINGS
@given(made_recipes(), st.data())
def test_transposed(made: Made, data: st.DataObject) -> None:
    """A transposed recipe is the recipe of the transposed tensor; transposed back it is the recipe it was."""
    recipe, sources, wanted = made
    perm = tuple(data.draw(st.permutations(range(len(recipe.shape)))))
    transposed = recipe.transposed(perm)
    array = materialize(transposed, sources)
    np.testing.assert_array_equal(array, wanted.transpose(perm))
    assert array.shape == transposed.shape
    assert array.flags.c_contiguous
    assert transposed.transposed(inverse(perm)) == recipe


@SETTINGS
@given(made_recipes())
def test_json_round_trip(made: Made) -> None:
    recipe = made[0].transposed(tuple(range(len(made[0].shape)))[::-1])
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("recipe", [Recipe("int64", (3,), values=(4, 5, 6)), Recipe("int64", (), values=(7,))])
def test_literal_values(recipe: Recipe) -> None:
    array = materialize(recipe, ArrayReader({}))
    assert array.tolist() == (list(recipe.values or ()) if recipe.shape else (recipe.values or ())[0])
    assert array.dtype == np.int64
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    with pytest.raises(ValueError, match="literal"):
        recipe.transposed((0,))


def stored_as(dtype: str, values: np.ndarray) -> np.ndarray:
    """What a recipe of ``dtype`` makes of all of a checkpoint's tensor ``x``."""
    piece = Piece("x", (0,), values.shape, (0,), (0,))
    return materialize(Recipe(dtype, values.shape, (piece,)), ArrayReader({"x": values}))


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("float32", np.float32), ("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
)
def test_conversions(source: type, dtype: str, numpy_dtype: type) -> None:
    """Every dtype becomes every other as numpy rounds it; to float32 it is exact."""
    numbers = [0.0, -0.0, 1.0, -1.5, 3.14159265, 1e-3, 6e-8, 32752.0, -(2.0**-14)]
    values = np.array(numbers, np.float32).astype(source)
    array = stored_as(dtype, values)
    assert array.dtype == numpy_dtype
    np.testing.assert_array_equal(array.astype(np.float32), values.astype(numpy_dtype).astype(np.float32))


def test_bfloat16_keeps_its_bits() -> None:
    """Every finite bfloat16 goes through float32 and back unchanged."""
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    values = values[np.isfinite(values.astype(np.float32))]
    back = stored_as("bfloat16", stored_as("float32", values))
    np.testing.assert_array_equal(back.view(np.uint16), values.view(np.uint16))


@pytest.mark.parametrize("value", [1e5, -7e4, 65520.0])
@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16])
def test_float16_overflow(value: float, source: type) -> None:
    """A finite weight that float16 would make infinite is an error that names the tensor and the way out."""
    with pytest.raises(OverflowError, match=r"x: holds values beyond float16's range; use --dtype bfloat16"):
        stored_as("float16", np.array([1.0, value], source))


def test_what_float16_can_hold() -> None:
    """The largest float16 is no overflow, and an infinite weight is the checkpoint's own."""
    values = np.array([65504.0, -65504.0, np.inf], np.float32)
    for part in (values[:2], values):
        np.testing.assert_array_equal(stored_as("float16", part), part)
