"""The bodies of quantized ops: the numbers that codes stand for, bit for bit, and what is computed with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from opmodels import op_model, run_op
from readers import ArrayReader

from moecompiler.config import NormalizationMode
from moecompiler.graph import ONNX_DTYPES
from moecompiler.materializing import Materializer
from moecompiler.ops import OpSpec
from moecompiler.packing import stored
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.plugins.quantized.dequantize import Form, dequantize_spec, form_of, forms
from moecompiler.plugins.quantized.linear import linear_spec
from moecompiler.plugins.quantized.moe import quantized_moe_spec
from moecompiler.quantization.arithmetic import dequantize, quantize
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, WeightScheme, int4
from moecompiler.weights import NUMPY_DTYPES, Part, Quantized, Recipe, whole

SCHEMES = (INT8, int4(16), int4(None), int4(16, symmetric=False), int4(None, symmetric=False))
ALL = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def form(scheme: WeightScheme) -> Form:
    found = form_of(scheme)
    assert found is not None
    return found


def attributes(scheme: WeightScheme) -> dict[str, Any]:
    return {"block_size": scheme.block_size} if form(scheme).blocks else {}


def parts_of(weight: np.ndarray, scheme: WeightScheme) -> list[tuple[Recipe, np.ndarray]]:
    """What a quantized op takes for a weight ``[..., out, in]``, as rows."""
    rows, columns = int(np.prod(weight.shape[:-1])), weight.shape[-1]
    dtype, its = str(weight.dtype), form(scheme)
    scales = (rows, columns // (scheme.block_size or columns)) if its.blocks else (rows,)
    wanted = {Part.CODES: (its.codes_dtype, (rows, columns)), Part.SCALES: (dtype, scales)}
    if its.asymmetric:
        wanted[Part.ZERO_POINTS] = ("int8", scales)
    source, tensors = whole("w", dtype, weight.shape), Materializer(ArrayReader({"w": weight}))
    recipes = [Recipe(kind, shape, quantized=Quantized(source, scheme, part)) for part, (kind, shape) in wanted.items()]
    return [(recipe, tensors.tensor(recipe)) for recipe in recipes]


def run_quantized(spec: OpSpec, attributes: dict[str, Any], *inputs: Any) -> np.ndarray:
    """Runs a body; an input that is a recipe and its array becomes an initializer, stored as files hold it."""
    floats = (
        next(array.dtype for array in inputs if isinstance(array, np.ndarray)) if spec.inputs[0].name == "x" else None
    )
    kind = ONNX_DTYPES[str(floats)] if floats else ONNX_DTYPES[inputs[1][0].dtype]
    model, feeds = op_model(spec, attributes, kind), {}
    for value, given in zip(spec.inputs, inputs, strict=True):
        if isinstance(given, tuple):
            recipe, array = given
            raw = stored(recipe, array).tobytes()
            model.graph.initializer.append(
                helper.make_tensor(value.name, ONNX_DTYPES[recipe.dtype], recipe.shape, raw, raw=True)
            )
            del model.graph.input[[each.name for each in model.graph.input].index(value.name)]
        else:
            feeds[value.name] = given
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@ALL
def test_the_numbers_that_codes_stand_for(scheme: WeightScheme, dtype: type) -> None:
    """Bit for bit, of a stack of matrices; 33 rows and, per row, an odd number of scales in all."""
    weight = np.random.default_rng(0).standard_normal((3, 11, 48)).astype(dtype)
    weight[1, 4] += 3  # rows of one sign have zero points at an end
    expected = dequantize(quantize(weight, scheme, np.dtype(dtype).name))
    got = run_quantized(dequantize_spec(form(scheme)), attributes(scheme), *parts_of(weight, scheme))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected.reshape(33, 48))
    assert 0 < np.abs(got - weight.reshape(33, 48)).max() < 0.6


@ALL
def test_linear(scheme: WeightScheme) -> None:
    rng = np.random.default_rng(1)
    weight, x = rng.standard_normal((24, 32)).astype(np.float32), rng.standard_normal((2, 5, 32)).astype(np.float32)
    got = run_quantized(linear_spec(form(scheme)), attributes(scheme), x, *parts_of(weight, scheme))
    np.testing.assert_allclose(got, x @ dequantize(quantize(weight, scheme, "float32")).T, atol=1e-5)


@pytest.mark.parametrize("mode", list(NormalizationMode))
@ALL
def test_moe(scheme: WeightScheme, mode: NormalizationMode) -> None:
    """As ``MoE`` with the numbers that codes stand for: some of the experts, in the three ways of routing."""
    rng = np.random.default_rng(2)
    x, router = rng.standard_normal((7, 32)).astype(np.float32), rng.standard_normal((5, 32)).astype(np.float32)
    gate_up, down = (
        rng.standard_normal((3, 96, 32)).astype(np.float32),
        rng.standard_normal((3, 32, 48)).astype(np.float32),
    )
    expert_ids, routing = np.array([0, 2, 3]), {"top_k": 2, "normalization_mode": int(mode)}
    numbers = [dequantize(quantize(weight, scheme, "float32")) for weight in (gate_up, down)]
    (expected,) = run_op(moe_spec(mode, 2), routing, x, router, *numbers, expert_ids)
    weights = (*parts_of(gate_up, scheme), *parts_of(down, scheme))
    spec = quantized_moe_spec(mode, 2, form(scheme))
    got = run_quantized(spec, routing | attributes(scheme), x, router, *weights, expert_ids)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("scheme", [int4(16), int4(16, symmetric=False)], ids=str)
def test_features_in_another_order(scheme: WeightScheme) -> None:
    """Each of three matrices in an order of its own, as experts are."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((3, 8, 48)).astype(np.float32)
    order = np.stack([rng.permutation(48) for _ in weight])
    grouped = np.take_along_axis(weight, order[:, None], axis=-1)
    expected = dequantize(replace(quantize(grouped, scheme, "float32"), order=order))
    positions = Recipe("int64", order.shape), np.argsort(order, axis=-1)
    spec = dequantize_spec(form(replace(scheme, act_order=True)))
    got = run_quantized(spec, attributes(scheme), *parts_of(grouped, scheme), positions)
    np.testing.assert_array_equal(got.reshape(weight.shape), expected)
    assert np.abs(expected - weight).max() < 0.6


def test_codes_in_bytes_are_what_onnx_reads() -> None:
    """The first of two numbers in the low half, a last one alone: by ONNX's own reader."""
    codes = np.random.default_rng(3).integers(-8, 8, (3, 5)).astype(np.int8)
    recipe = Recipe("int4", codes.shape)
    raw = stored(recipe, codes).tobytes()
    assert len(raw) == recipe.nbytes == 8
    tensor = helper.make_tensor("codes", TensorProto.INT4, codes.shape, raw, raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)


def test_every_form_has_a_name_of_its_own() -> None:
    """A graph holds one body for each name; several schemes may stand in it."""
    names = [spec.name for each in forms() for spec in (dequantize_spec(each), linear_spec(each))]
    assert len(set(names)) == len(names)
    ordered = [replace(scheme, act_order=True) for scheme in SCHEMES if scheme.block_size]
    assert {form(scheme) for scheme in (*SCHEMES, FP8, NVFP4, *ordered)} == set(forms())
    assert all(isinstance(linear_spec(each).function(), onnx.FunctionProto) for each in forms())
    assert {NUMPY_DTYPES[each.codes_dtype] for each in forms()} == {np.dtype(np.int8), FP8.format.dtype}
