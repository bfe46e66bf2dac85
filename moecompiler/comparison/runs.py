"""Programs run on the same text, and what was seen of them, by row and position."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from moecompiler.comparison.sessions import ObservedSession
from moecompiler.mapping import Mapping as RankMapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.threads import run_in_threads
from moecompiler.validation.scenario import Scenario

OpenSession = Callable[[int], AbstractContextManager[ObservedSession]]
"""Opens a rank's session; called on the rank's thread."""


@dataclass(frozen=True)
class Run:
    """``logits [batch, steps, vocab]``; ``hidden [batch, length, hidden]`` by place and ``routed [batch, length, experts]``
    (router logits) by layer, float32, zeros where ``seen [batch, length]`` says that there was no token."""

    logits: np.ndarray
    hidden: Mapping[str, np.ndarray]
    routed: Mapping[int, np.ndarray]
    seen: np.ndarray


def seen_tokens(scenario: Scenario) -> np.ndarray:
    """Which tokens of each row are run, bool ``[batch, length]``."""
    ends = np.array(scenario.prompt_lengths) + scenario.decode_steps
    return np.arange(scenario.tokens.shape[1]) < ends[:, None]


def observed_run(
    open_session: OpenSession,
    mapping: RankMapping,
    scenario: Scenario,
    forced: Mapping[int, np.ndarray] | None = None,
) -> Run:
    """All ranks through a scenario, as threads. ``forced``: router logits by layer, as ``Run.routed`` has them."""

    def run(communicator: Communicator) -> Run:
        rank, stage = communicator.rank, mapping.tp_size
        first = rank % stage == 0
        logits: list[np.ndarray] = []
        hidden: dict[str, np.ndarray] = {}
        routed: dict[int, np.ndarray] = {}
        with open_session(rank) as session:
            session.start(len(scenario.tokens))
            for step in scenario.steps():
                rows = np.arange(len(step.position_ids))[:, None]
                if forced is not None:
                    session.force({layer: array[rows, step.position_ids] for layer, array in forced.items()})
                x = step.input_ids if mapping.is_first_stage(rank) else communicator.receive(rank - stage)
                y = session.step(x, step.position_ids, step.last_token_ids)
                if mapping.is_last_stage(rank):
                    logits.append(y)
                else:
                    communicator.send(y, rank + stage)
                if first:
                    valid = np.arange(step.position_ids.shape[1]) <= step.last_token_ids[:, None]
                    _put(hidden, session.hidden, step.position_ids, valid, scenario)
                    _put(routed, session.routed, step.position_ids, valid, scenario)
        found = np.stack(logits, axis=1) if logits else np.empty(0, np.float32)
        return Run(found, hidden, routed, seen_tokens(scenario))

    stages = run_in_threads(mapping.world_size, run)[:: mapping.tp_size]
    return Run(
        stages[-1].logits,
        {place: array for each in stages for place, array in each.hidden.items()},
        {layer: array for each in stages for layer, array in each.routed.items()},
        stages[0].seen,
    )


def _put(
    kept: dict[Any, np.ndarray],
    seen: Mapping[Any, np.ndarray],
    positions: np.ndarray,
    valid: np.ndarray,
    scenario: Scenario,
) -> None:
    """What was seen of a step's tokens where these stand in their rows."""
    rows, columns = np.nonzero(valid)
    for name, array in seen.items():
        if name not in kept:
            kept[name] = np.zeros((*scenario.tokens.shape, array.shape[-1]), np.float32)
        kept[name][rows, positions[rows, columns]] = array[rows, columns]
