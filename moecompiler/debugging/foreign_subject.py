"""An ONNX file of somebody else, run on random inputs that fit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from moecompiler.backends.onnxruntime_program import WeightCache, open_program
from moecompiler.debugging.observe import run_prefix
from moecompiler.debugging.subject import Outputs
from moecompiler.errors import UserError
from moecompiler.foreign import OnnxReader, open_foreign
from moecompiler.graph import Program
from moecompiler.validation.place import Arrays
from moecompiler.validation.tolerances import TOLERANCES, Tolerance

_SIZES = (2, 7)  # of the first open dim that inputs name, and of the others
_INTEGERS = {TensorProto.INT64: np.int64, TensorProto.INT32: np.int32}
_FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: np.float32}


@dataclass(frozen=True)
class ForeignFile:
    """``path`` is read anew for each run of passes; inputs are made once, from ``seed``."""

    path: Path
    seed: int = 0

    @cached_property
    def _opened(self) -> tuple[Program, OnnxReader]:
        return open_foreign(self.path)

    @property
    def reader(self) -> OnnxReader:
        return self._opened[1]

    @cached_property
    def weights(self) -> WeightCache:
        return WeightCache(self.reader)

    @cached_property
    def tolerance(self) -> Tolerance:
        """That of the narrowest type the file computes in (bfloat16 is computed in float32)."""
        graph = self._opened[0].model.graph
        kinds = {tensor.data_type for tensor in graph.initializer}
        kinds |= {value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
        return TOLERANCES["float16" if TensorProto.FLOAT16 in kinds else "float32"]

    def load(self) -> tuple[Program, ...]:
        return (open_foreign(self.path)[0],)

    def run(self, programs: Sequence[Program]) -> Outputs:
        """Every floating-point output."""
        (program,) = programs
        results = open_program(program, self.weights).run(None, self.feeds)
        return [np.asarray(each, np.float32) for each in results if np.issubdtype(np.asarray(each).dtype, np.floating)]

    def observe(self, programs: Sequence[Program], names: Sequence[str], rank: int) -> Arrays:
        return run_prefix(programs[rank], self.weights, self.feeds, names)

    def reference(self) -> Outputs | None:
        return None

    @cached_property
    def feeds(self) -> dict[str, np.ndarray]:
        """Random values of each input's type and shape; token ids within the table they look up, masks of ones, positions in
        order. Raises: UserError where an input is of another type."""
        graph = self._opened[0].model.graph
        held = {tensor.name for tensor in graph.initializer}
        rng, sizes = np.random.default_rng(self.seed), dict[str, int]()
        return {value.name: self._input(value, graph, rng, sizes) for value in graph.input if value.name not in held}

    def _input(
        self, value: onnx.ValueInfoProto, graph: onnx.GraphProto, rng: np.random.Generator, sizes: dict[str, int]
    ) -> np.ndarray:
        kind, shape = value.type.tensor_type.elem_type, list[int]()
        for dim in value.type.tensor_type.shape.dim:
            open_dim = dim.dim_param or f"{value.name}[{len(shape)}]"
            shape.append(dim.dim_value or sizes.setdefault(open_dim, _SIZES[min(len(sizes), 1)]))
        if "mask" in value.name:
            return np.ones(shape, _INTEGERS.get(kind, np.bool_ if kind == TensorProto.BOOL else _FLOATS.get(kind)))
        if kind in _INTEGERS:
            if "position" in value.name:
                return np.broadcast_to(np.arange(shape[-1], dtype=_INTEGERS[kind]), shape).copy()
            return rng.integers(0, _rows_looked_up(value.name, graph), shape).astype(_INTEGERS[kind])
        if kind in _FLOATS:
            return rng.standard_normal(shape).astype(_FLOATS[kind])
        if kind == TensorProto.BOOL:
            return np.ones(shape, np.bool_)
        name = TensorProto.DataType.Name(kind).lower()
        raise UserError(f"{self.path}: input {value.name} is of type {name}: no inputs can be made for it")


def _rows_looked_up(name: str, graph: onnx.GraphProto) -> int:
    """How many rows the table has that the input indexes; 2 where it indexes none."""
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[1] == name]
    return min((rows[node.input[0]] for node in lookups if node.input[0] in rows), default=2)
