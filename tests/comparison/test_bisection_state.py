"""A bisection that is interrupted, or whose process ends with a probe, goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from moecompiler.artifact import Artifact
from moecompiler.comparison.bisect import Judgement, PluginNode
from moecompiler.comparison.ddmin import Outcome
from moecompiler.errors import UserError
from moecompiler.plugin_switches import Mode, PluginSwitches
from moecompiler.tools.comparison import bisection
from moecompiler.tools.comparison.bisection import CRASHED, STATE, bisect_plugins

NODES = tuple(PluginNode("MoE", f"model.layers.{layer}.mlp/MoE") for layer in range(4))
Bisect = Callable[..., list[PluginNode]]


class Killed(BaseException):
    """In place of a signal that ends the process."""


@pytest.fixture
def bisect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bisect:
    """A search of ``NODES``, of which the third is wrong, without building anything."""
    monkeypatch.setattr(bisection, "nodes_of", lambda engines, source: NODES)
    monkeypatch.setattr(bisection, "_key", lambda engines, source, check: check)
    monkeypatch.setattr(bisection, "flags_of", lambda engines, switches: (None, 8))
    monkeypatch.setattr(bisection, "run_build", lambda *arguments: None)
    monkeypatch.setattr(bisection, "_other_tactics", lambda engines, probe: [])
    monkeypatch.setattr(bisection.Artifact, "open", lambda *arguments: None)

    def run(judge: Callable[[set[PluginNode]], Judgement], check: str = "logits") -> list[PluginNode]:
        def judged(engines: Artifact, switches: PluginSwitches) -> Judgement:
            return judge({node for node in NODES if switches.mode(node.op, node.name) is Mode.ON})

        engines: Artifact = SimpleNamespace(directory=tmp_path)  # type: ignore[assignment]
        return list(bisect_plugins(engines, engines, judged, check, tmp_path).culprits)

    return run


def honest(on: set[PluginNode]) -> Judgement:
    return Judgement(Outcome.FAIL, float("inf")) if NODES[2] in on else Judgement(Outcome.PASS, 0.25)


class Counted:
    """Judges honestly, and does ``instead`` when it is asked for the time ``at``."""

    def __init__(self, at: int = -1, instead: BaseException | None = None):
        self.at, self.instead, self.asked = at, instead, 0

    def __call__(self, on: set[PluginNode]) -> Judgement:
        self.asked += 1
        if self.asked == self.at and self.instead is not None:
            raise self.instead
        return honest(on)


def test_what_was_tried_is_not_tried_again(bisect: Bisect) -> None:
    first, again, other = Counted(), Counted(), Counted()
    assert bisect(first) == bisect(again) == [NODES[2]]
    assert again.asked == 0
    assert bisect(other, "perplexity") == [NODES[2]]
    assert other.asked == first.asked > 3


def test_an_interrupt_is_no_verdict(bisect: Bisect, tmp_path: Path) -> None:
    interrupted, rest, whole = Counted(3, KeyboardInterrupt()), Counted(), Counted()
    with pytest.raises(KeyboardInterrupt):
        bisect(interrupted)
    assert json.loads((tmp_path / STATE).read_text())["begun"] is None
    assert bisect(rest) == [NODES[2]]
    bisect(whole, "all of it")
    assert 2 + rest.asked == whole.asked


def test_a_probe_that_ends_the_process_is_unresolved(
    bisect: Bisect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bisection._State, "end", lambda self: None)  # nothing is tidied up by a dead process
        with pytest.raises(Killed):
            bisect(Counted(3, Killed()))
    begun = json.loads((tmp_path / STATE).read_text())["begun"]
    assert begun
    rest = Counted()
    assert bisect(rest) == [NODES[2]]
    probes = json.loads((tmp_path / STATE).read_text())["probes"]
    assert [each["note"] for each in probes if each["plugins"] == begun] == [CRASHED]


def test_engines_that_cannot_be_built_are_tried_again_next_time(bisect: Bisect, tmp_path: Path) -> None:
    first, again = Counted(3, UserError("TensorRT found no tactic")), Counted()
    assert bisect(first) == bisect(again) == [NODES[2]]
    assert again.asked <= 1


@pytest.mark.parametrize("content", ["", "[]", '{"key": "logits", "probes": 3, "begun": null}', '{"key": "logits"}'])
def test_a_state_that_cannot_be_read_is_begun_anew(bisect: Bisect, tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).write_text(content)
    assert bisect(honest) == [NODES[2]]


def test_a_state_that_cannot_be_written_is_one_line(bisect: Bisect, tmp_path: Path) -> None:
    (tmp_path / STATE).mkdir()
    with pytest.raises(UserError, match=rf"{STATE}: cannot be written"):
        bisect(honest)
