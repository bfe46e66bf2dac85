"""Programs run as they are, without building an engine: weights stay in memory and are shared by all programs that use them."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from moecompiler.backends.onnxruntime import open_model
from moecompiler.backends.onnxruntime_lowering import lower
from moecompiler.graph import ONNX_DTYPES, Program
from moecompiler.materializing import Materializer
from moecompiler.packing import stored
from moecompiler.weights import NUMPY_DTYPES, Recipe, TensorReader

_ROOM_BYTES = 1 << 30  # of weights that are kept although the programs at hand do not use them
_WIDENED_BYTES = 2 << 30  # of half-precision weights, up to which ONNX Runtime may keep copies of them in float32


class WeightCache:
    """Weights by their recipes, each read once, whatever the threads; ``onnxruntime.OrtValue`` over arrays of the recipe's
    dtype. Sessions read the arrays where they are: a cache must outlive them."""

    def __init__(self, reader: TensorReader):
        self._tensors = Materializer(reader)
        self._values: dict[Recipe, tuple[np.ndarray, onnxruntime.OrtValue]] = {}
        self._lock = threading.Lock()

    def value(self, recipe: Recipe) -> onnxruntime.OrtValue:
        with self._lock:
            if recipe not in self._values:
                bits = as_bits(recipe, self._tensors.tensor(recipe))
                kind = ONNX_DTYPES[recipe.dtype]
                self._values[recipe] = bits, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)
            return self._values[recipe][1]

    def make_room(self, needed: set[Recipe]) -> None:
        """Lets go of what is not needed, if there is much of it. No session that uses it may be there any more."""
        with self._lock:
            rest = self._values.keys() - needed
            if sum(recipe.nbytes for recipe in rest) > _ROOM_BYTES:
                for recipe in rest:
                    del self._values[recipe]


def as_bits(recipe: Recipe, array: np.ndarray) -> np.ndarray:
    """A tensor as ONNX Runtime takes it: types that numpy lacks as the bits of one that it has."""
    if recipe.dtype in ("bfloat16", "float8_e4m3fn"):
        return array.view(f"u{array.itemsize}")
    if recipe.dtype != "int4":
        return array
    # it goes by the array's shape and wants a byte for each element, of which it reads the first half; the others are never
    # touched, so no memory is behind them
    packed = stored(recipe, array)
    room = np.empty(recipe.shape, np.uint8)
    room.reshape(-1)[: packed.size] = packed
    return room


def open_program(
    program: Program, weights: WeightCache, threads: int = 0, *, optimized: bool = True
) -> onnxruntime.InferenceSession:
    """A session of a program, lowered as a build lowers it; ``optimized``: with ONNX Runtime's own graph optimizations, but where
    they would widen gigabytes of weights and keep the copies.

    Collectives go through the communicator of the thread that runs it.
    """
    return open_lowered(lower(program), weights, threads, optimized=optimized)


def open_lowered(
    lowered: Program, weights: WeightCache, threads: int = 0, *, optimized: bool = True
) -> onnxruntime.InferenceSession:
    """``open_program`` of a program that has been lowered."""
    names = [t.name for t in lowered.model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    options = onnxruntime.SessionOptions()
    halves = sum(recipe.nbytes for recipe in lowered.weights.values() if NUMPY_DTYPES[recipe.dtype].itemsize == 2)
    if not optimized or halves > _WIDENED_BYTES:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if names:
        options.add_external_initializers(names, [weights.value(lowered.weights[name]) for name in names])
    return open_model(lowered.model.SerializeToString(), options, threads)


def run_part(
    part: onnx.ModelProto, program: Program, weights: WeightCache, feeds: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Runs a part that was cut out of a program's graph, as it is written, without optimizing it."""
    kept = {tensor.name for tensor in part.graph.initializer}
    recipes = {name: recipe for name, recipe in program.weights.items() if name in kept}
    session = open_program(Program(part, recipes), weights, optimized=False)
    return [np.asarray(value) for value in session.run(None, dict(feeds))]


def input_types(program: Program) -> dict[str, tuple[np.dtype, tuple[int | str, ...]]]:
    """The dtype in which ONNX Runtime takes each input of a program, and its shape, open dims by name."""
    types = {}
    for value in program.model.graph.input:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        wide = TensorProto.FLOAT if tensor.elem_type == TensorProto.BFLOAT16 else tensor.elem_type
        types[value.name] = np.dtype(helper.tensor_dtype_to_np_dtype(wide)), shape
    return types
