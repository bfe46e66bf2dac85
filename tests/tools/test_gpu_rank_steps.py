"""What a GPU is asked to show of ranks, and how the answers are read; nothing here needs a GPU."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator, current_communicator
from moecompiler.runtime.threads import run_in_threads
from moecompiler.tools import gpu_long
from moecompiler.tools.bench_all_reduce import Measured, Row, slowest, table
from moecompiler.tools.bench_all_reduce import main as bench_all_reduce
from moecompiler.tools.compare_ranks import Run, judge, line
from moecompiler.tools.gpu_check import ROOT, every_step, select
from moecompiler.tools.gpu_kinds import MAPPINGS, RANK_MAPPINGS
from moecompiler.tools.gpu_rank_steps import COMPARED
from moecompiler.tools.gpu_schedule import check
from moecompiler.tools.gpu_steps import Places

STEPS = every_step(Places(ROOT, Path("/work-dir")))


def test_steps_are_in_order_and_there() -> None:
    check(STEPS)
    chosen = {step.name: step for step in select(STEPS, "ranks", "")}
    assert {"compile-float16-on-one", "compile-float16-on-tp2", "ranks-auto", "all-reduce-4"} <= chosen.keys()
    for step in chosen.values():
        if step.group == "ranks" and step.command[2].startswith("moecompiler.tools."):
            assert (ROOT / "tools" / f"{step.command[2].rpartition('.')[2]}.py").is_file()
        for word in step.command:
            assert not word.startswith("tests/") or (ROOT / word).is_file()


def test_every_mapping_is_compared() -> None:
    """Those that the issue of ranks names, as the command line spells them."""
    options = {
        "--tp_size": "tp_size",
        "--pp_size": "pp_size",
        "--moe_tp_size": "moe_tp_size",
        "--moe_ep_size": "moe_ep_size",
    }
    found = {}
    for name in COMPARED:
        words = (MAPPINGS | RANK_MAPPINGS)[name]
        sizes = dict(zip((options[word] for word in words[::2]), map(int, words[1::2]), strict=True))
        found[name] = Mapping.create(**sizes)
    assert found == {
        "tp2": Mapping.create(2),
        "tp4": Mapping.create(4),
        "ep2": Mapping.create(2, moe_ep_size=2),
        "ep4": Mapping.create(4, moe_ep_size=4),
        "tp2ep2": Mapping.create(4, moe_tp_size=2, moe_ep_size=2),
        "pp2": Mapping.create(pp_size=2),
        "tp2pp2": Mapping.create(2, 2),
    }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (0.0, "2 of 2 texts are those of one rank, logits within 0.0010 (by ipc)"),
        (0.01, "1 of 2 texts are those of one rank, logits within 0.0010; the others part at ties (by ipc)"),
        (3.0, "1 of 2 texts are those of one rank, logits within 0.0010; the others part at MORE THAN TIES (by ipc)"),
    ],
)
def test_runs_are_judged(wrong: float, said: str) -> None:
    """A text that one side ended early is compared as far as it goes."""
    exact = np.zeros((3, 4), np.float32)
    exact[:, 1] = 1.0
    exact[2, 2] = 1.0 - wrong
    near = exact + np.float32(0.001)
    first = [1, 1, 2 if wrong else 1]
    rows = judge([[5], [6]], [(first, near), ([1], near[:1])], [([1, 1, 1], exact), ([1, 1, 1], exact)], 0.05)
    assert (
        line(Run("tp2", "ipc", ["by ipc"], rows, all(row.passed for row in rows))) == f"tp2, --collectives ipc: {said}"
    )


def test_a_run_that_failed() -> None:
    assert line(Run("tp2", "nccl", ["exit status 2"], [], False)) == "tp2, --collectives nccl: FAILED: exit status 2"


def test_times_are_the_slowest_ranks() -> None:
    ranks = [
        Measured("H100", "0", "CUDA IPC", None, [Row(4096, {"copy": a, "one shot": 2 * b})])
        for a, b in ((1, 5), (3, 4))
    ]
    (row,) = slowest(ranks)
    assert row == Row(4096, {"copy": 3, "one shot": 10})
    console = Console(width=80, file=StringIO())
    console.print(table([row, Row(1 << 20, {"copy": 7.25})], "title"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [word in text for word in ("title", "4 ", "10.0", "1024", "7.2", "nccl")] == [True] * 5 + [False]


@pytest.mark.parametrize(("words", "said"), [(("--ranks", "1"), "give 2 to 8"), (("--sizes", "12"), "multiples of 16")])
def test_refusals(words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_all_reduce([str(tmp_path / "rows.json"), *words])
    assert said in capsys.readouterr().err


class Counting:
    """A session whose next token is one more than the last."""

    vocab_size, max_batch_size, max_input_len, max_seq_len = 8, 1, 32, 96

    def start(self, batch: int) -> None:
        """There is nothing to keep."""

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> np.ndarray:
        return np.eye(8, dtype=np.float32)[(x[[0], last_token_ids] + 1) % 8]


@pytest.mark.parametrize("leak", [0, 8])
def test_a_long_generation(leak: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that goes, a bit with every token behind the warm-up, is noticed on the rank where it goes."""
    taken = {0: 0, 1: 0}

    def free_memory() -> int:
        rank = current_communicator().rank
        taken[rank] += 1
        return 1000 - (leak * taken[rank] if rank == 1 and taken[rank] > 60 else 0)

    def open_engines(folder: Path, ranks: Communicator) -> tuple[None, SimpleNamespace]:
        return None, SimpleNamespace(rank=ranks.rank, local_rank=0)

    monkeypatch.setattr(gpu_long, "open_engines", open_engines)
    monkeypatch.setattr(gpu_long, "load_rank", lambda *_: Counting())
    monkeypatch.setattr(gpu_long.Job, "of", lambda _: SimpleNamespace(mapping=Mapping.create(2)))
    monkeypatch.setattr(gpu_long, "free_memory", free_memory)
    first, second = run_in_threads(2, lambda ranks: gpu_long.generate_for_long(Path("engines"), 100, 50, ranks))
    assert first.passed is second.passed is (leak == 0)
    assert (first.tokens, first.same, first.free_first) == (160, True, [1000, 1000])
    assert f"{leak * 224} less in between" in gpu_long.report(first)
