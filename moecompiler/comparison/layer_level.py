"""Where along the run the error enters, and how it grows: hidden states of each program against the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moecompiler.comparison.observed import layers_of
from moecompiler.comparison.result import LayerErrors, LayerLevel, Stretch
from moecompiler.comparison.runs import Run
from moecompiler.validation.difference import relative_error
from moecompiler.validation.scenario import Scenario

_DECODE_STRETCHES = 8


def measure_layers(reference: Run, runs: Mapping[str, Run], scenario: Scenario, how: str) -> LayerLevel:
    """``runs`` by program; compared is what all of them have seen."""
    places = [place for place in reference.hidden if all(place in run.hidden for run in runs.values())]
    stretches, masks = stretches_of(scenario)
    programs = []
    for name, run in runs.items():
        relative, worst = [], []
        for place in places:
            mine, theirs = run.hidden[place], reference.hidden[place]
            relative.append(tuple(relative_error(mine[mask], theirs[mask]) for mask in masks))
            worst.append(tuple(_worst(mine[mask], theirs[mask]) for mask in masks))
        whole = [relative_error(run.hidden[p][run.seen], reference.hidden[p][run.seen]) for p in places]
        programs.append(LayerErrors(name, tuple(relative), tuple(worst), _growth(places, whole)))
    return LayerLevel(how, tuple(places), layers_of(places), tuple(stretches), tuple(programs))


def stretches_of(scenario: Scenario) -> tuple[list[Stretch], list[np.ndarray]]:
    """Prefill, and decode in parts of equal length, with the tokens of each, bool ``[batch, length]``."""
    lengths = np.array(scenario.prompt_lengths)[:, None]
    positions = np.arange(scenario.tokens.shape[1])
    longest = int(lengths.max())
    stretches, masks = [Stretch("prefill", 0, longest - 1)], [positions < lengths]
    for steps in np.array_split(np.arange(scenario.decode_steps), min(_DECODE_STRETCHES, scenario.decode_steps) or 1):
        if len(steps):
            stretches.append(Stretch("decode", longest + int(steps[0]), longest + int(steps[-1])))
            masks.append((positions >= lengths + steps[0]) & (positions <= lengths + steps[-1]))
    return stretches, masks


def _worst(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Of a token, ``[tokens, hidden]``."""
    errors = np.linalg.norm(mine.astype(np.float64) - theirs, axis=-1)
    norms = np.maximum(np.linalg.norm(theirs.astype(np.float64), axis=-1), np.finfo(np.float32).tiny)
    ratios = errors / norms
    return float(np.where(np.isfinite(ratios), ratios, np.inf).max())


def _growth(places: Sequence[str], relative: Sequence[float]) -> tuple[float, ...]:
    """Over the error of what enters the layer."""
    growth, entering = [], 0.0
    for place, error in zip(places, relative, strict=True):
        growth.append(error / entering if entering else 1.0)
        if not place.endswith((".self_attn", ".mlp")):
            entering = error
    return tuple(growth)
