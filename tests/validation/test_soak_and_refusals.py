"""The soak and the refusals that a GPU is asked to show, on engines of ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moecompiler.artifact import Artifact
from moecompiler.runtime.session import StageSession
from moecompiler.tools.gpu_refusals import CASES, attempt, cut_in_half, flip_a_byte, judge, made_elsewhere
from moecompiler.tools.gpu_soak import WARMUP, Result, report, shape, soak
from moecompiler.tools.job import Job
from moecompiler.tools.run import load_rank

pytestmark = pytest.mark.xdist_group("validation")


@pytest.fixture(scope="module")
def session(one_rank: Path) -> StageSession:
    return load_rank(Artifact.open(one_rank), 0, 1, False)


def soaked(one_rank: Path, session: StageSession, free: Callable[[], int]) -> Result:
    return soak(session, Job.of(Artifact.open(one_rank)).mapping, 12, 4, free)


def falling() -> Iterator[int]:
    yield from range(1000, 0, -1)


@pytest.mark.parametrize(
    ("free", "flat"), [(iter([9] * 50), True), (iter([9, 9, 8, 9, 9, 9, 9, 9]), False), (falling(), False)]
)
def test_memory_has_to_stay_flat(one_rank: Path, session: StageSession, free: Iterator[int], flat: bool) -> None:
    result = soaked(one_rank, session, lambda: next(free))
    assert result.passed == flat
    assert (result.fixed_runs, result.fixed_changed) == (2, 0)
    assert ("NOT FLAT" in report(result)) == (not flat)


def test_a_prompt_has_to_stay_the_same(one_rank: Path, session: StageSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that remembers something of earlier batches is found out."""
    step, calls = session.step, iter(range(10_000))
    monkeypatch.setattr(
        session, "step", lambda x, *others: step((x + (next(calls) > 40)) % session.vocab_size, *others)
    )
    result = soaked(one_rank, session, lambda: 9)
    assert result.fixed_changed == 1
    assert not result.passed


def test_shapes_alternate() -> None:
    """Every batch with every length, none too long; nothing new after the warm-up."""
    limits: Any = SimpleNamespace(max_batch_size=8, max_input_len=64, max_seq_len=144)
    shapes = [shape(turn, limits) for turn in range(2000)]
    assert set(shapes) == {(batch, length) for batch in range(1, 9) for length in range(1, 64)} == set(shapes[:WARMUP])
    one: Any = SimpleNamespace(max_batch_size=1, max_input_len=1, max_seq_len=20)
    assert shape(5, one) == (1, 1)


def test_damage(tmp_path: Path) -> None:
    plan, record = tmp_path / "plan", tmp_path / "engine.json"
    plan.write_bytes(bytes(range(10)))
    flip_a_byte(plan)
    assert [i for i, byte in enumerate(plan.read_bytes()) if byte != i] == [5]
    cut_in_half(plan)
    assert len(plan.read_bytes()) == 5
    record.write_text(json.dumps({"made": {"sm": 90, "gpu": "this"}, "bound": []}, indent=1))
    size = record.stat().st_size
    made_elsewhere(record, sm=80, gpu="another")
    assert json.loads(record.read_text()) == {"made": {"sm": 80, "gpu": "another"}, "bound": []}
    assert record.stat().st_size == size  # which is looked at even where hashes are not


def test_only_one_clear_line_will_do() -> None:
    case = CASES[0]
    good = "moecompiler: error: rank0.plan: has changed since; compile it again\n"
    assert judge(case, 2, good).passed
    assert not judge(case, 1, good).passed
    assert not judge(case, 2, f"Traceback\n{good}").passed
    assert not judge(case, 2, "moecompiler: error: no\n").passed


def test_damaged_weights_are_refused(one_rank: Path, tmp_path: Path) -> None:
    row = attempt(CASES[1], one_rank, tmp_path / "copy")
    assert row.passed, row
