"""Inner tensors, seen by running the part of the graph that leads to them: marking them as outputs of the whole would change
what a backend fuses, and so what is looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.onnxruntime import OnnxRuntimeSession
from moecompiler.backends.onnxruntime_program import WeightCache, input_types, open_program, run_part
from moecompiler.cutting import cut
from moecompiler.graph import Program
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.threads import run_in_threads
from moecompiler.validation.place import Arrays
from moecompiler.validation.scenario import Step


def observe_rank(
    programs: Sequence[Program],
    mapping: Mapping,
    weights: WeightCache,
    limits: EngineLimits,
    step: Step,
    names: Sequence[str],
    rank: int,
) -> Arrays:
    """Tensors ``names`` of one rank's program in a step with an empty cache; all ranks up to its stage take part."""
    stage = mapping.pp_rank(rank)

    def run(communicator: Communicator) -> Arrays | None:
        mine, program = communicator.rank, programs[communicator.rank]
        if mapping.pp_rank(mine) > stage:
            return None
        x = step.input_ids if mapping.is_first_stage(mine) else communicator.receive(mine - mapping.tp_size)
        if mapping.pp_rank(mine) < stage:
            session = OnnxRuntimeSession(open_program(program, weights, 1), limits)
            session.start(len(step.input_ids))
            communicator.send(session.step(x, step.position_ids, step.last_token_ids), mine + mapping.tp_size)
            return None
        return run_prefix(program, weights, feeds_of(program, step, x), names)

    found = run_in_threads(mapping.world_size, run)[rank]
    assert found is not None
    return found


def feeds_of(program: Program, step: Step, x: np.ndarray) -> Arrays:
    """What a rank's graph is fed in a step: ``x`` are token ids or hidden states; caches are empty."""
    given = {
        "input_ids": x,
        "hidden_states": x,
        "position_ids": step.position_ids,
        "last_token_ids": step.last_token_ids,
    }
    feeds: Arrays = {}
    for name, (dtype, shape) in input_types(program).items():
        if name in given:
            feeds[name] = np.ascontiguousarray(given[name], dtype)
        else:
            feeds[name] = np.zeros((len(x), *(int(dim) for dim in shape[1:])), dtype)
    return feeds


def run_prefix(program: Program, weights: WeightCache, feeds: Arrays, names: Sequence[str]) -> Arrays:
    """Tensors ``names`` of a program that is fed ``feeds``; those it is fed are given back."""
    wanted = [name for name in names if name not in feeds]
    if not wanted:
        return {name: feeds[name] for name in names}
    part = cut(program.model, wanted, ())
    inputs = {value.name: feeds[value.name] for value in part.graph.input}
    values = dict(zip(wanted, run_part(part, program, weights, inputs), strict=True))
    return {name: values[name] if name in values else feeds[name] for name in names}


def boundaries(program: Program) -> list[str]:
    """The tensors that leave a module (``graph.output_of``), from the graph's start to its end."""
    return [name for node in program.model.graph.node for name in node.output if name.endswith("/output")]
