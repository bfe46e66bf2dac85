"""Which experts each program chooses, and where it chooses otherwise than the reference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moecompiler.comparison.model_level import Texts
from moecompiler.comparison.result import Flip, ProgramRouting, Replayed, RoutingLevel, Token
from moecompiler.comparison.runs import Run
from moecompiler.validation.scenario import Scenario


def measure_routing(
    reference: Run,
    runs: Mapping[str, Run],
    scenario: Scenario,
    top_k: int,
    tie: float,
    text: Texts,
    replayed: Replayed | None = None,
) -> RoutingLevel:
    """``tie``: the relative margin (``ties.router_margin``) that rounding may decide."""
    layers = sorted(layer for layer in reference.routed if all(layer in run.routed for run in runs.values()))
    wanted = {layer: _tokens(reference, layer) for layer in layers}
    choices = {layer: choose(values, top_k) for layer, values in wanted.items()}
    programs = []
    for name, run in runs.items():
        got = {layer: choose(_tokens(run, layer), top_k) for layer in layers}
        flips = tuple(f for layer in layers for f in _flips(layer, choices[layer], got[layer], wanted[layer], tie))
        experts = next(iter(wanted.values())).shape[-1] if wanted else 0
        counts = np.zeros((len(layers), experts), np.int64)
        for flip in flips:
            counts[layers.index(flip.layer), flip.wanted] += 1
        rerouted = len({(flip.layer, flip.token) for flip in flips}) / max(1, sum(map(len, choices.values())))
        programs.append(
            ProgramRouting(name, _listed(got, layers), flips, tuple(tuple(row) for row in counts.tolist()), rerouted)
        )
    experts = next(iter(wanted.values())).shape[-1] if wanted else 0
    return RoutingLevel(
        tuple(layers),
        experts,
        top_k,
        _run_tokens(reference, scenario, text),
        _listed(choices, layers),
        tuple(programs),
        replayed,
    )


def choose(logits: np.ndarray, top_k: int) -> np.ndarray:
    """The experts of each token, ``[tokens, experts]`` → ``[tokens, top_k]``, in falling order; of equals the lower number. All
    ways of routing take the largest logits (``moecompiler.routing``)."""
    return np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]


def _tokens(run: Run, layer: int) -> np.ndarray:
    return np.asarray(run.routed[layer][run.seen])


def _run_tokens(run: Run, scenario: Scenario, text: Texts) -> tuple[Token, ...]:
    return tuple(
        Token(
            text(int(scenario.tokens[row, at])),
            int(scenario.tokens[row, at]),
            int(row),
            int(at),
            "prefill" if at < scenario.prompt_lengths[row] else "decode",
        )
        for row, at in zip(*np.nonzero(run.seen), strict=True)
    )


def _listed(choices: Mapping[int, np.ndarray], layers: list[int]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(tuple(tuple(row) for row in choices[layer].tolist()) for layer in layers)


def _flips(layer: int, wanted: np.ndarray, got: np.ndarray, logits: np.ndarray, tie: float) -> list[Flip]:
    """Experts that the reference chose and the program did not, each with one of those it chose instead."""
    top_k, flips = wanted.shape[1], []
    ordered = -np.sort(-logits.astype(np.float64), axis=-1)
    for token, (right, left) in enumerate(zip(wanted.tolist(), got.tolist(), strict=True)):
        missing = [expert for expert in right if expert not in left]
        instead = [expert for expert in left if expert not in right]
        if not missing:
            continue
        margin = float(ordered[token, top_k - 1] - ordered[token, top_k])
        relative = margin / max(float(np.abs(ordered[token]).max()), float(np.finfo(np.float32).tiny))
        flips += [
            Flip(layer, token, a, b, margin, relative, relative <= tie) for a, b in zip(missing, instead, strict=True)
        ]
    return flips
