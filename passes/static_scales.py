"""Static scales of what meets FP8 weights, as small weights of the graph."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.errors import UserError
from moecompiler.graph import weight_tensor
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.scales import positive
from moecompiler.quantized import published_name
from moecompiler.weights import Recipe


def without_scale(weight: Recipe, plan: QuantizationRecipe) -> str | None:
    """The name of a tensor of ``weight`` whose input has no static scale in ``plan``; None where all have one."""
    names = sorted(map(published_name, weight.sources))
    return next((name for name in names if plan.input_scale(name) is None), None)


def input_scales(name: str, weight: Recipe, plan: QuantizationRecipe, weights: dict[str, Recipe]) -> gs.Constant:
    """The scales of what ``weight`` ``[out, in]`` or ``[experts, out, in]``, the initializer ``name``, is multiplied with, in its
    type: ``[1]``, or one for each expert. Tensors that are one matrix here get one input, and so the largest of their scales.

    Raises: UserError where a scale is beyond the type.
    """
    experts = weight.shape[0] if len(weight.shape) == 3 else 1
    scales = np.zeros(experts, np.float32)
    for piece in weight.pieces:
        scale = plan.input_scale(published_name(piece.source))
        if scale is None:
            raise ValueError(f"{piece.source} has no scale of its input")
        expert = piece.at[0] if len(weight.shape) == 3 else 0
        scales[expert] = max(scales[expert], scale)
    try:
        rounded = positive(scales, weight.dtype)
    except OverflowError as error:
        raise UserError(f"{name}: its inputs have static scales up to {scales.max():.4g}: {error}") from None
    made = f"{name.removesuffix('.T')}.input_scales"
    weights[made] = Recipe(weight.dtype, (experts,), values=tuple(map(float, rounded)))
    return gs.Constant(made, LazyValues(weight_tensor(made, weights[made])))
