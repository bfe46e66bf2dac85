"""Layers, logits and routing of runs that are made up, with errors that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moecompiler.comparison.layer_level import measure_layers, stretches_of
from moecompiler.comparison.model_level import EDGES, greedy_texts, histogram, measure_model
from moecompiler.comparison.result import Flip, Stretch, Ulps
from moecompiler.comparison.routing_level import choose, measure_routing
from moecompiler.comparison.runs import Run, seen_tokens
from moecompiler.comparison.thresholds import bounds_for, held
from moecompiler.comparison.verdict import verdict
from moecompiler.quantization.schemes import Format
from moecompiler.validation.scenario import Scenario

rng = np.random.default_rng(0)
SCENARIO = Scenario("text", rng.integers(0, 12, (2, 9)), (5, 4), 3)
PLACES = ("model.embed_tokens", "model.layers.0.self_attn", "model.layers.0", "model.layers.1")
SEEN = seen_tokens(SCENARIO)


def made() -> Run:
    hidden = {place: rng.standard_normal((2, 9, 16)).astype(np.float32) for place in PLACES}
    routed = {layer: rng.standard_normal((2, 9, 6)).astype(np.float32) for layer in range(2)}
    return Run(rng.standard_normal((2, 4, 12)).astype(np.float32), hidden, routed, SEEN)


REFERENCE = made()


def text(token: int) -> str:
    return f"t{token} "


def test_what_is_run() -> None:
    assert SEEN.sum(axis=1).tolist() == [8, 7]
    stretches, masks = stretches_of(SCENARIO)
    assert stretches == [Stretch("prefill", 0, 4), *(Stretch("decode", at, at) for at in (5, 6, 7))]
    assert [np.argwhere(mask).tolist() for mask in masks[1:]] == [[[0, at], [1, at - 1]] for at in (5, 6, 7)]
    assert (np.sum(masks, axis=0) == SEEN).all()


def test_layers() -> None:
    """Twice the error after the first layer, and in a stretch of decode ten times."""
    errors = dict(zip(PLACES, (1e-3, 3e-3, 2e-3, 4e-3), strict=True))
    hidden = {place: array * np.float32(1 + errors[place]) for place, array in REFERENCE.hidden.items()}
    hidden["model.layers.1"][:, 7] = REFERENCE.hidden["model.layers.1"][:, 7] * np.float32(1.04)
    hidden["model.layers.1"][1, 7] = np.nan  # which was not run
    runs = {"plugins": replace(REFERENCE, hidden=hidden), "ootb": REFERENCE}
    level = measure_layers(REFERENCE, runs, SCENARIO, "seen")
    assert level.places == PLACES
    assert level.layers == (None, 0, 0, 1)
    plugins, ootb = level.programs
    for place, row in zip(PLACES, plugins.relative, strict=True):
        assert row[0] == pytest.approx(errors[place], rel=1e-3)
    assert plugins.worst[3][3] == pytest.approx(0.04, rel=1e-3)
    assert 4e-3 < plugins.relative[3][3] < 0.04
    assert plugins.growth[:3] == pytest.approx((1, 3, 2), rel=1e-2)
    assert not np.array(ootb.relative).any()
    failed = [check for check in verdict(bounds_for("float32"), layer=level) if not check.passed]
    assert [check.name for check in failed] == ["relative error", "error over the other program's"]
    assert "plugins, model.layers.1" in failed[0].subject
    assert all(check.passed for check in verdict(bounds_for("float16"), layer=level) if check.name == "relative error")


def test_model() -> None:
    logits = REFERENCE.logits.copy()
    logits[0, 1] += 0.02
    logits[1, 2, REFERENCE.logits[1, 2].argmin()] += 50
    level = measure_model(REFERENCE.logits, {"plugins": logits, "ootb": REFERENCE.logits}, SCENARIO, text)
    plugins, ootb = level.programs
    assert [(token.row, token.position, token.phase) for token in level.tokens[:5]] == [
        (0, 4, "prefill"), (0, 5, "decode"), (0, 6, "decode"), (0, 7, "decode"), (1, 3, "prefill")
    ]  # fmt: skip
    assert level.tokens[0].text == text(SCENARIO.tokens[0, 4])
    assert plugins.max_abs == pytest.approx(50)
    assert sum(plugins.errors.counts) == logits.size
    assert plugins.errors.counts[-1] == 0
    assert plugins.errors.counts[EDGES.index(10.0**1.5)] == 1
    assert len(plugins.kl) == 8
    assert plugins.kl[1] == pytest.approx(0, abs=1e-9)  # all logits shifted alike
    assert max(plugins.kl) == plugins.kl[6] > 10
    assert (plugins.top1, ootb.top1, ootb.top5, ootb.mean_kl) == (7 / 8, 1, 1, 0)
    assert 0.9 < plugins.top5 < 1
    assert ootb.perplexity == level.reference_perplexity
    assert level.between is not None
    assert level.between.mean_kl == pytest.approx(plugins.mean_kl)
    broken = measure_model(REFERENCE.logits, {"plugins": logits * np.nan, "ootb": logits}, SCENARIO, text)
    assert (broken.programs[0].mean_kl, broken.programs[0].errors.counts[-1]) == (np.inf, logits.size)
    assert [check.passed for check in verdict(bounds_for("float16"), model=broken)][:3] == [False] * 3


def test_histogram() -> None:
    counted = histogram(np.array([0.0, 5e-8, 2e-7, 1.5, np.inf, np.nan]))
    assert (counted.edges[0], counted.counts[0], counted.counts[-1], sum(counted.counts)) == (0, 2, 2, 6)


def test_greedy_text() -> None:
    exact = np.zeros((1, 3, 12))
    exact[0, :, 1] = 1
    exact[0, 2, 2] = 0.99
    mine = exact.copy()
    mine[0, 2, 2] += 0.02
    ids = ([[1, 1, 1]], exact), ([[1, 1, 2]], mine)
    (found,) = greedy_texts([[3, 4]], ids[0], {"plugins": ids[1], "ootb": ids[0]}, text, 0.05)
    plugins, ootb = found.programs
    assert (found.prompt, found.prompt_tokens, found.reference) == ("t3 t4 ", 2, ("t1 ", "t1 ", "t1 "))
    assert (plugins.equal, plugins.texts[2], plugins.tie) == (2, "t2 ", True)
    assert (plugins.margin, plugins.error) == (pytest.approx(0.01), pytest.approx(0.02))
    assert (ootb.equal, ootb.margin, ootb.tie) == (3, None, True)
    assert not greedy_texts([[3]], ids[0], {"plugins": ids[1]}, text, 0.005)[0].programs[0].tie


def test_routing() -> None:
    """One token near a tie takes the next expert; another one is sent elsewhere altogether."""
    wanted = {layer: array.copy() for layer, array in REFERENCE.routed.items()}
    wanted[1][0, 2] = [4, 3, 2.999, 0, 0, 0]
    wanted[1][1, 1] = [4, 3, 0, 0, 0, 0]
    routed = {layer: array.copy() for layer, array in wanted.items()}
    routed[1][0, 2] = [4, 2.999, 3, 0, 0, 0]
    routed[1][1, 1] = [0, 0, 0, 0, 3, 4]
    routed[1][1, 8] = [0, 0, 0, 0, 3, 4]  # which was not run
    reference = replace(REFERENCE, routed=wanted)
    level = measure_routing(
        reference, {"plugins": replace(REFERENCE, routed=routed), "ootb": reference}, SCENARIO, 2, 4e-3, text
    )
    plugins, ootb = level.programs
    assert (level.layers, level.experts, len(level.tokens)) == ((0, 1), 6, 15)
    assert [(t.row, t.position, t.phase) for t in level.tokens[7:10]] == [
        (0, 7, "decode"),
        (1, 0, "prefill"),
        (1, 1, "prefill"),
    ]
    near, *far = plugins.flips
    assert near == Flip(1, 2, 1, 2, pytest.approx(1e-3, rel=1e-3), pytest.approx(1e-3 / 4, rel=1e-3), True)
    assert [(flip.token, flip.wanted, flip.got, flip.within) for flip in far] == [(9, 0, 5, False), (9, 1, 4, False)]
    assert plugins.flip_counts == ((0,) * 6, (1, 2, 0, 0, 0, 0))
    assert plugins.rerouted == pytest.approx(2 / 30)
    assert (ootb.flips, ootb.rerouted) == ((), 0)
    assert level.reference[1][2] == (*plugins.choices[1][2][:1], 1)
    checks = {(c.name, c.subject): c for c in verdict(bounds_for("float16"), routing=level)}
    assert checks["share of tokens routed otherwise", "plugins"].passed
    assert checks["of them beyond a tie", "plugins"].value == pytest.approx(1 / 30)
    assert not all(check.passed for check in verdict(bounds_for("float32"), routing=level))


def test_equal_logits_go_to_the_lower_number() -> None:
    assert choose(np.array([[1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), 2).tolist() == [[1, 2], [0, 1]]


def test_bounds_follow_types_and_formats() -> None:
    half, narrow = bounds_for("float16"), bounds_for("bfloat16")
    assert bounds_for("float32").kl < half.kl < narrow.kl
    assert bounds_for("float16", {Format.INT8}) == half
    assert bounds_for("float16", {Format.E4M3}).kl == narrow.kl
    loose = bounds_for("float16", {Format.INT4}, tokens=1000, against_floats=True)
    assert loose.kl > half.kl
    assert loose.top1 < half.top1
    few = bounds_for("float16", {Format.INT4}, tokens=10, against_floats=True)
    assert few.kl == few.hidden == np.inf
    level = measure_model(REFERENCE.logits, {"A": REFERENCE.logits, "B": REFERENCE.logits}, SCENARIO, text)
    assert verdict(few, model=level) == ()  # no check that could not fail
    assert {check.name for check in verdict(loose, model=level)} >= {"mean KL", "top-1 agreement"}


def test_what_a_node_is_held_to() -> None:
    """A row or an element alone can be too far off; a step between two codes may be."""
    exact, rounded = Ulps(0, 0, 0, 0, 0), Ulps(2.0, 0.3, 1.0, 1e-3, 0.4)
    assert all(each.passed for each in held("MoE", rounded, exact, (np.inf, np.inf)))
    worse = replace(rounded, mean=0.9)
    assert [each.passed for each in held("MoE", worse, rounded, (1.2, 1.5))] == [False, True, True]
    assert all(each.passed for each in held("MoE", worse, rounded, (1.0, 1.5)))
    row, element = replace(rounded, row=2.5), replace(rounded, max=30.0)
    assert [each.passed for each in held("MoE", row, rounded, (1.0, 1.2))] == [True, False, True]
    assert [each.passed for each in held("MoE", element, rounded, (1.0, 1.2))] == [True, True, False]
    for op in ("MoEFp8", "AttentionInt8Cache"):
        assert all(each.passed for far in (row, element) for each in held(op, far, rounded, (1.0, 1.2)))
    none = Ulps(np.inf, np.inf, np.inf, np.inf, np.inf)
    assert [each.passed for each in held("MoE", none, rounded, None)] == [False]
    assert [each.passed for each in held("MoE", none, none, None)] == [True]
    assert [each.passed for each in held("MoE", rounded, none, None)] == [True]
