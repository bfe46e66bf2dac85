"""What a node is fed in every step of a run, prefill and decode, its program run without plugins on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moecompiler.backends.onnxruntime_program import WeightCache
from moecompiler.comparison.capture import rounded
from moecompiler.comparison.nodes import OpNode, op_node
from moecompiler.debugging.observe import feeds_of, run_prefix
from moecompiler.errors import UserError
from moecompiler.graph import Program
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.threads import run_in_threads
from moecompiler.validation.place import Arrays
from moecompiler.validation.scenario import Step
from moecompiler.weights import TensorReader, materialize


@dataclass(frozen=True)
class StepInputs:
    """A node of a rank's program, and what it is fed in each step, by the op's names of its inputs, as ``Captured`` has it."""

    rank: int
    node: OpNode
    feeds: tuple[Arrays, ...]


def inputs_of_steps(
    programs: Sequence[Program], mapping: Mapping, reader: TensorReader, steps: Sequence[Step], name: str
) -> StepInputs:
    """Of the node called ``name``, on the first rank that has it; caches go from step to step. All ranks run, as threads, each
    with all its weights.

    Raises: UserError where no rank has such a node.
    """
    owner = next((r for r, p in enumerate(programs) if any(n.name == name for n in p.model.graph.node)), None)
    if owner is None:
        raise UserError(f"there is no node {name}")
    node = next(node for node in programs[owner].model.graph.node if node.name == name)
    alone = op_node(programs[owner], node)
    weights = {tensor.name for tensor in programs[owner].model.graph.initializer}
    inner = [tensor for tensor in alone.inputs.values() if tensor not in weights]

    def run(communicator: Communicator) -> list[Arrays]:
        rank = communicator.rank
        program, cache, found = programs[rank], WeightCache(reader), list[Arrays]()
        outputs = [value.name for value in program.model.graph.output]
        caches: Arrays = {}
        for step in steps:
            x = step.input_ids if mapping.is_first_stage(rank) else communicator.receive(rank - mapping.tp_size)
            feeds = feeds_of(program, step, x) | caches
            values = run_prefix(program, cache, feeds, [*outputs, *(inner if rank == owner else ())])
            caches = {
                name.replace("present.", "past_key_values."): values[name] for name in outputs if "present." in name
            }
            if not mapping.is_last_stage(rank):
                communicator.send(values[outputs[0]], rank + mapping.tp_size)
            found.append({name: values[name] for name in inner if name in values})
        return found

    seen = run_in_threads(mapping.world_size, run)[owner]
    return StepInputs(owner, alone, tuple(_by_op(alone, tensors, reader) for tensors in seen))


def _by_op(node: OpNode, tensors: Arrays, reader: TensorReader) -> Arrays:
    named = {op: rounded(np.asarray(tensors[t]), node.types[t]) for op, t in node.fed.items() if t in tensors}
    if node.router is not None:
        named["router"] = rounded(materialize(node.router, reader), node.types[node.inputs["router"]])
    return named
