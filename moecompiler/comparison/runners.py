"""Programs as Polygraphy runners. Arrays go in and out by the graph's names, in types that numpy has: bfloat16 as float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.datatype import DataType

from moecompiler.backends.onnxruntime_program import WeightCache, open_lowered
from moecompiler.comparison.expert_by_expert import ExpertByExpert, is_large_moe
from moecompiler.comparison.rounding import lower_with_rounding
from moecompiler.graph import Program
from moecompiler.validation.place import Arrays
from moecompiler.weights import TensorReader


class OpenProgram(Protocol):
    """What makes a runner of a program: with plugins, or without, on one backend."""

    def __call__(self, program: Program, examples: Sequence[Arrays]) -> BaseRunner:
        """``examples``: inputs of all shapes that it is to be run on. Raises: UserError where it cannot be built or run."""


class BodiesOnOnnxRuntime:
    """Bodies of ops, as they are written, with the rounding that goes with their type (``rounding``)."""

    def __init__(self, reader: TensorReader, threads: int = 0):
        self._reader, self._threads = reader, threads

    def __call__(self, program: Program, examples: Sequence[Arrays]) -> BaseRunner:
        from polygraphy.backend.onnxrt import OnnxrtRunner

        if is_large_moe(program):
            return ExpertByExpert(program, examples[0], self._reader, self._threads)
        weights, lowered = WeightCache(self._reader), lower_with_rounding(program)
        return OnnxrtRunner(lambda: open_lowered(lowered, weights, self._threads), name="ootb")


def infer(runner: BaseRunner, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """What an active runner makes of its inputs among ``arrays``: those of floats, whatever their type, are given to it in
    the one it takes. The outputs are copies, nobody else's."""
    wanted = runner.get_input_metadata(use_numpy_dtypes=False)
    feeds = {
        name: np.ascontiguousarray(arrays[name], DataType.to_dtype(wanted[name].dtype, "numpy")) for name in wanted
    }
    return {name: np.array(array) for name, array in runner.infer(feeds).items()}
