"""What programs with quantized weights should compute: the programs before that, with the numbers that codes stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx

from moecompiler.backends.onnxruntime import OnnxRuntimeBackend
from moecompiler.debugging.rounding import scales_by_source, with_rounded_inputs
from moecompiler.graph import Program, weight_tensor
from moecompiler.quantization.schemes import WeightScheme
from moecompiler.quantized import numbers_of
from moecompiler.weights import Part, Recipe, Shape

_Schemes = Mapping[str, tuple[WeightScheme, Shape]]  # source of codes → their scheme, and how its boxes are turned


def quantized_as(programs: Iterable[Program], quantized: Iterable[Program]) -> tuple[Program, ...]:
    """The programs with numbers in place of each weight of which ``quantized``, the same ranks' programs after passes, have
    codes, and what meets FP8 weights rounded; for ONNX Runtime, which rounds no product of code and scale to bfloat16."""
    return tuple(_with_numbers(mine, theirs) for mine, theirs in zip(programs, quantized, strict=True))


def _with_numbers(program: Program, quantized: Program) -> Program:
    schemes: dict[str, tuple[WeightScheme, Shape]] = {}
    for recipe in quantized.weights.values():
        if recipe.quantized is not None and recipe.quantized.part is Part.CODES:
            for piece in recipe.quantized.source.pieces:
                schemes[piece.source] = recipe.quantized.scheme, piece.perm
    weights = {name: _numbers(recipe, schemes) for name, recipe in program.weights.items()}
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    for index, tensor in enumerate(model.graph.initializer):
        if weights.get(tensor.name) != program.weights.get(tensor.name):
            model.graph.initializer[index].CopyFrom(weight_tensor(tensor.name, weights[tensor.name]))
    with_rounded_inputs(model, program.weights, scales_by_source(quantized))
    return Program(model, weights)


def _numbers(recipe: Recipe, schemes: _Schemes) -> Recipe:
    if not recipe.is_boxes or len(recipe.shape) < 2 or not recipe.pieces:
        return recipe
    if not all(piece.source in schemes for piece in recipe.pieces):
        return recipe
    piece = recipe.pieces[0]
    scheme, perm = schemes[piece.source]
    dtype = OnnxRuntimeBackend().compute_dtype(recipe.dtype)
    return numbers_of(recipe, scheme, dtype, transposed=piece.perm[-2:] != perm[-2:])
