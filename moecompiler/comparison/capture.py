"""What nodes of ops of ours are fed in a real run: a program walked through from node to node, on ONNX Runtime.

Each stretch of the graph between two nodes is run by itself, so that the weights of one node are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from moecompiler.backends.onnxruntime_program import WeightCache, run_part
from moecompiler.comparison.nodes import OpNode, is_op_node, op_node
from moecompiler.cutting import cut
from moecompiler.debugging.observe import feeds_of
from moecompiler.graph import Program
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.threads import run_in_threads
from moecompiler.validation.place import Arrays
from moecompiler.validation.scenario import Step
from moecompiler.weights import TensorReader, materialize


@dataclass(frozen=True)
class Captured:
    """A node of a rank's program, and what it was fed, by the op's names of its inputs; a router is among them. bfloat16 is
    float32 here, rounded."""

    rank: int
    node: OpNode
    feeds: Arrays


def capture(
    programs: Sequence[Program], mapping: Mapping, reader: TensorReader, step: Step, wanted: Collection[str]
) -> list[Captured]:
    """The nodes called ``wanted`` in a step with empty caches, of the first rank of each stage; others differ in their share
    of the weights alone. All ranks run, as threads."""

    def run(communicator: Communicator) -> list[Captured]:
        rank = communicator.rank
        program, last = programs[rank], mapping.is_last_stage(rank)
        x = step.input_ids if mapping.is_first_stage(rank) else communicator.receive(rank - mapping.tp_size)
        # a cache for each rank: one must not let go of what another's session reads
        walk = _Walk(program, WeightCache(reader), feeds_of(program, step, x))
        first = rank % mapping.tp_size == 0
        found = []
        left = {node.name for node in program.model.graph.node} & {*wanted}
        for name, feeds in walk.nodes(left if last else None):
            if first and name in left:
                (node,) = (each for each in program.model.graph.node if each.name == name)
                found.append(Captured(rank, *_with_router(op_node(program, node), feeds, reader)))
        if not last:
            communicator.send(walk.output(), rank + mapping.tp_size)
        return found

    return [each for found in run_in_threads(mapping.world_size, run) for each in found]


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """``array`` as a runner is fed numbers of ``dtype``: bfloat16 as float32."""
    if dtype == "bfloat16":
        return np.asarray(array, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    if dtype in ("float16", "float32"):
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype)
    return np.ascontiguousarray(array)


def _with_router(node: OpNode, feeds: Arrays, reader: TensorReader) -> tuple[OpNode, Arrays]:
    named = {op: rounded(feeds[tensor], node.types[tensor]) for op, tensor in node.fed.items() if tensor in feeds}
    if node.router is not None:
        named["router"] = rounded(materialize(node.router, reader), node.types[node.inputs["router"]])
    return node, named


class _Walk:
    """``known``: tensors that have been computed, as long as a later node reads them."""

    def __init__(self, program: Program, weights: WeightCache, feeds: Arrays):
        self._program, self._weights, self._graph = program, weights, program.model.graph
        self._given = frozenset(feeds)
        self.known = dict(feeds)

    def nodes(self, wanted: Collection[str] | None) -> Iterator[tuple[str, Arrays]]:
        """Every node of an op of ours, with its inputs that are no weights; up to the last of ``wanted`` (None: to the end)."""
        ours = [(index, node) for index, node in enumerate(self._graph.node) if is_op_node(node)]
        left = None if wanted is None else {*wanted}
        held = {tensor.name for tensor in self._graph.initializer}
        for index, node in ours:
            if left is not None and not left:
                return
            names = [name for name in node.input if name not in held]
            self._compute(names)
            yield node.name, {name: self.known[name] for name in names}
            if left is not None:
                left.discard(node.name)
            read = {name for later in self._graph.node[index:] for name in later.input} | self._given
            self.known = {name: array for name, array in self.known.items() if name in read}

    def output(self) -> np.ndarray:
        """The rank's first output."""
        name = self._graph.output[0].name
        self._compute([name])
        return self.known[name]

    def _compute(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.known]
        if not missing:
            return
        part = cut(self._program.model, missing, stops=self.known.keys())
        kept = {tensor.name for tensor in part.graph.initializer}
        self._weights.make_room({recipe for name, recipe in self._program.weights.items() if name in kept})
        feeds = {value.name: self.known[value.name] for value in part.graph.input}
        self.known.update(zip(missing, run_part(part, self._program, self._weights, feeds), strict=True))
