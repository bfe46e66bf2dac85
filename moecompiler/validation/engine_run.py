"""One rank's engine through a scenario, in step with its peers."""

from __future__ import annotations

import numpy as np

from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.session import StageSession
from moecompiler.validation.scenario import Scenario


def engine_logits(
    session: StageSession, mapping: Mapping, scenario: Scenario, communicator: Communicator
) -> np.ndarray | None:
    """Logits of each step, ``[batch, steps, vocab]`` float32, on the ranks of the last stage; None elsewhere."""
    rank, stage = communicator.rank, mapping.tp_size
    session.start(len(scenario.tokens))
    logits = []
    for step in scenario.steps():
        x = step.input_ids if mapping.is_first_stage(rank) else communicator.receive(rank - stage)
        y = session.step(x, step.position_ids, step.last_token_ids)
        if mapping.is_last_stage(rank):
            logits.append(y)
        else:
            communicator.send(y, rank + stage)
    return np.stack(logits, axis=1) if logits else None
