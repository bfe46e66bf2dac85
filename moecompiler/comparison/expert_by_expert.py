"""The body of a MoE whose weights are large, one expert at a time: ONNX Runtime would hold all of them in float32, more than
once."""

from __future__ import annotations

from collections import OrderedDict
from time import perf_counter

import numpy as np

from moecompiler.backends.onnxruntime_program import WeightCache, open_lowered
from moecompiler.comparison.exact import all_inputs, by_expert, ort_value
from moecompiler.comparison.nodes import op_node, weights_of
from moecompiler.comparison.rounding import lower_with_rounding
from moecompiler.graph import Program, floating_type
from moecompiler.materializing import Materializer
from moecompiler.validation.place import Arrays
from moecompiler.validation.runners import ModuleRunner
from moecompiler.weights import TensorReader

LARGE = 1 << 30  # bytes


def is_large_moe(program: Program) -> bool:
    """Whether a program is one node of a MoE with large weights."""
    nodes = program.model.graph.node
    size = sum(recipe.nbytes for recipe in program.weights.values())
    return len(nodes) == 1 and nodes[0].op_type.startswith("MoE") and size > LARGE


class ExpertByExpert(ModuleRunner):
    """A MoE node's body with the rounding that goes with its type; experts' shares are summed in float32 and rounded once, as
    the body does it."""

    def __init__(self, program: Program, example: Arrays, reader: TensorReader, threads: int = 0):
        super().__init__(self._run, example, "ootb")
        (node,) = program.model.graph.node
        self._node = op_node(program, node)
        self._dtype = floating_type(program)
        lowered = lower_with_rounding(Program(all_inputs(program.model)), outputs=False)
        self._kinds = {value.name: value.type.tensor_type.elem_type for value in lowered.model.graph.input}
        self._session = open_lowered(lowered, WeightCache(reader), threads)
        self._weights = weights_of(self._node, Materializer(reader))

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, np.ndarray]:
        begin = perf_counter()
        outputs = super().infer_impl(feed_dict)
        self.inference_time = perf_counter() - begin
        return outputs

    def deactivate_impl(self) -> None:
        self._weights.clear()

    def _run(self, feeds: Arrays) -> Arrays:
        from moecompiler.comparison.capture import rounded

        given = {name: ort_value(array, self._kinds[name]) for name, array in feeds.items()}
        totals: Arrays = {}
        names = [value.name for value in self._session.get_outputs()]
        for part in by_expert(self._weights):
            tensors = {self._node.inputs[name]: array for name, array in part.items()}
            values = given | {name: ort_value(array, self._kinds[name]) for name, array in tensors.items()}
            for name, value in zip(names, self._session.run_with_ort_values(names, values), strict=True):
                share = value.numpy()
                totals[name] = totals[name] + share if name in totals else share
        return {name: rounded(total, self._dtype) for name, total in totals.items()}
