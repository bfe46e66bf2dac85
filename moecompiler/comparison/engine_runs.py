"""Engines as they are, on a text and on prompts, and how long their steps take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.connections import connected
from moecompiler.runtime.generation import GenerationOptions, generate
from moecompiler.runtime.session import StageSession
from moecompiler.runtime.threads import run_in_threads
from moecompiler.runtime.ways import Asked
from moecompiler.validation.scenario import Scenario

OpenEngine = Callable[[int], AbstractContextManager[StageSession]]
"""Loads a rank's engine; called on the rank's thread."""


@dataclass(frozen=True)
class EngineRun:
    """``logits [batch, steps, vocab]`` float32; seconds of the first step, after one like it, and of each that follows, by
    the clock of the first rank of the last stage."""

    logits: np.ndarray
    prefill_s: float
    decode_s: tuple[float, ...]


def run_engine(open_engine: OpenEngine, mapping: Mapping, scenario: Scenario, *, timed: bool = False) -> EngineRun:
    """All ranks through a scenario, as threads, as many sequences at a time as engines take. ``timed``: prefills once before,
    so that what is loaded in the first step is not measured."""

    def run(communicator: Communicator) -> EngineRun:
        with open_engine(communicator.rank) as session, connected(Asked.auto, communicator, mapping, session):
            parts = []
            for first in range(0, len(scenario.tokens), session.max_batch_size):
                rows = slice(first, first + session.max_batch_size)
                part = Scenario(
                    scenario.name, scenario.tokens[rows], scenario.prompt_lengths[rows], scenario.decode_steps
                )
                if timed and not first:
                    _steps(session, mapping, part, communicator, 1)
                parts.append(_steps(session, mapping, part, communicator, None))
        logits = np.concatenate([each.logits for each in parts])
        return EngineRun(logits, parts[0].prefill_s, parts[0].decode_s)

    return run_in_threads(mapping.world_size, run)[mapping.world_size - mapping.tp_size]


def _steps(
    session: StageSession, mapping: Mapping, scenario: Scenario, communicator: Communicator, most: int | None
) -> EngineRun:
    rank, stage = communicator.rank, mapping.tp_size
    session.start(len(scenario.tokens))
    logits, times = [], []
    for step in scenario.steps()[:most]:
        begin = perf_counter()
        x = step.input_ids if mapping.is_first_stage(rank) else communicator.receive(rank - stage)
        y = session.step(x, step.position_ids, step.last_token_ids)
        if mapping.is_last_stage(rank):
            logits.append(y)
        else:
            communicator.send(y, rank + stage)
        times.append(perf_counter() - begin)
    found = np.stack(logits, axis=1) if logits else np.empty((0, 0, 0), np.float32)
    return EngineRun(found, times[0], tuple(times[1:]))


def greedy(
    open_engine: OpenEngine, mapping: Mapping, prompts: Sequence[Sequence[int]], steps: int
) -> tuple[list[list[int]], np.ndarray]:
    """Each prompt's most likely continuation, ``steps`` tokens of it, and the logits ``[prompts, steps, vocab]`` float32."""
    options = GenerationOptions(steps, keep_logits=True, micro_batches=1)

    def run(communicator: Communicator) -> tuple[list[list[int]], np.ndarray]:
        with open_engine(communicator.rank) as session, connected(Asked.auto, communicator, mapping, session):
            made = generate(session, communicator, mapping, [list(each) for each in prompts], options)
        return made.output_ids, np.empty(0) if made.logits is None else made.logits

    return run_in_threads(mapping.world_size, run)[0]
