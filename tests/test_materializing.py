"""Quantized weights by reference: what a recipe says, how often a weight is read, and how tensors lie in a file."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from readers import ArrayReader

from moecompiler.errors import UserError
from moecompiler.graph import Program, point_weights_at, weight_tensor
from moecompiler.materializing import Materializer
from moecompiler.packing import pack
from moecompiler.quantization.arithmetic import dequantize, quantize
from moecompiler.quantization.schemes import INT8, WeightScheme, int4
from moecompiler.weights import Part, Quantized, Recipe, joined, materialize, whole

ROWS, COLUMNS = 6, 64
ASYMMETRIC = int4(32, symmetric=False)
WEIGHT = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float16)
SOURCE = whole("w", "float16", WEIGHT.shape)


def parts(scheme: WeightScheme, source: Recipe = SOURCE) -> dict[str, Recipe]:
    codes = "int8" if scheme == INT8 else "int4"
    scales = scheme.scale_shape(source.shape)
    made = {"codes": Recipe(codes, source.shape, quantized=Quantized(source, scheme, Part.CODES))}
    made["scales"] = Recipe(source.dtype, scales, quantized=Quantized(source, scheme, Part.SCALES))
    if not scheme.symmetric:
        made["zero_points"] = Recipe("int8", scales, quantized=Quantized(source, scheme, Part.ZERO_POINTS))
    return made


@pytest.mark.parametrize("scheme", [INT8, int4(32), ASYMMETRIC], ids=str)
def test_parts_are_made_of_one_reading(scheme: WeightScheme) -> None:
    reader = ArrayReader({"w": WEIGHT})
    tensors, expected = Materializer(reader), quantize(WEIGHT, scheme, "float16")
    offset = 0 if scheme.symmetric else 8
    made = {name: tensors.tensor(recipe) for name, recipe in parts(scheme).items()}
    np.testing.assert_array_equal(made["codes"] + offset, expected.codes)
    np.testing.assert_array_equal(made["scales"], expected.scales)
    if expected.zero_points is not None:
        np.testing.assert_array_equal(made["zero_points"] + offset, expected.zero_points)
    assert len(reader.reads) == 1
    np.testing.assert_array_equal(tensors.tensor(parts(scheme)["codes"]), made["codes"])  # asked for again: made again
    assert len(reader.reads) == 2


def test_numbers_that_codes_stand_for() -> None:
    """In the scales' dtype they are rounded to it, in a wider one not; turned where that is asked for."""
    source, tensors = whole("w", "bfloat16", WEIGHT.shape), Materializer(ArrayReader({"w": WEIGHT}))
    made = quantize(WEIGHT.astype(ml_dtypes.bfloat16), INT8, "bfloat16")
    narrow = Recipe("bfloat16", source.shape, quantized=Quantized(source, INT8, Part.WEIGHT))
    np.testing.assert_array_equal(tensors.tensor(narrow), dequantize(made))
    wide = Recipe("float32", source.shape[::-1], quantized=Quantized(source, INT8, Part.WEIGHT, (1, 0)))
    exact = made.codes.astype(np.float32) * made.scales.astype(np.float32)[:, None]
    np.testing.assert_array_equal(tensors.tensor(wide), exact.T)
    assert (exact != tensors.tensor(narrow)).any()


@pytest.mark.parametrize("recipe", parts(ASYMMETRIC).values(), ids=list(parts(ASYMMETRIC)))
def test_recipes_are_data(recipe: Recipe) -> None:
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe.sources == SOURCE.sources == {"w"}
    turned = Recipe("float16", (COLUMNS, ROWS), quantized=Quantized(SOURCE, INT8, Part.WEIGHT, (1, 0)))
    assert Recipe.from_json(json.loads(json.dumps(turned.to_json()))) == turned


def test_what_quantizing_made_is_neither_cut_nor_joined() -> None:
    codes = parts(INT8)["codes"]
    with pytest.raises(ValueError, match="quantized recipes are not transposed"):
        codes.transposed((1, 0))
    with pytest.raises(ValueError, match="not made of boxes"):
        joined([codes, codes], 0)
    with pytest.raises(ValueError, match="a recipe of boxes"):
        materialize(codes, ArrayReader({"w": WEIGHT}))


def test_numbers_that_are_none_name_their_tensor() -> None:
    broken = WEIGHT.copy()
    broken[2, 3] = np.nan
    with pytest.raises(UserError, match=r"^w: cannot be quantized: the weight holds NaN or infinity$"):
        Materializer(ArrayReader({"w": broken})).tensor(parts(INT8)["codes"])


def test_a_packed_file_is_what_onnx_reads(tmp_path: Path) -> None:
    """Codes, scales and zero points where the graph's initializers point, by ONNX's own reader; each weight read once."""
    weight = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float16)
    reader = ArrayReader({"w": weight, "v": weight[::-1]})
    recipes = {f"v.{name}": each for name, each in parts(ASYMMETRIC, whole("v", "float16", weight.shape)).items()}
    recipes |= {f"w.{name}": each for name, each in parts(INT8, whole("w", "float16", weight.shape)).items()}
    pack([(tmp_path / "weights.safetensors", recipes)], reader)
    assert [name for name, _ in reader.reads] == ["v", "w"]
    graph = onnx.helper.make_graph([], "g", [], [], [weight_tensor(name, each) for name, each in recipes.items()])
    model = point_weights_at(Program(onnx.helper.make_model(graph), recipes), "weights.safetensors").model
    tensors = Materializer(reader)
    for tensor in model.graph.initializer:
        read = numpy_helper.to_array(tensor, str(tmp_path))
        np.testing.assert_array_equal(read.astype(np.float32), tensors.tensor(recipes[tensor.name]).astype(np.float32))
    assert {each.name for each in model.graph.initializer} == set(recipes)
