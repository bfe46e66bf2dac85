"""Tasks per rank in one or several processes: the same results, and no process left behind however it ends."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from moecompiler.errors import UserError
from moecompiler.workers import ProgressFn, _portable, run_ranks


class TwoArgumentError(Exception):
    """Cannot be unpickled from its message alone."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


def square(item: int, progress: ProgressFn) -> tuple[int, int]:
    for done in range(5):
        progress(done, 5)
    return item * item, os.getpid()


def label(item: str, progress: ProgressFn) -> str:
    return item.upper()


def threads(item: int, progress: ProgressFn) -> tuple[str | None, str | None]:
    return os.environ.get("OMP_NUM_THREADS"), os.environ.get("MKL_NUM_THREADS")


class Placed:
    """Meets the others, so that all run at one time, and tells its place."""

    def __init__(self, folder: Path, place: int = -1):
        self.folder, self.place = folder, place

    def in_place(self, place: int) -> "Placed":
        return Placed(self.folder, place)

    def __call__(self, item: int, progress: ProgressFn) -> int:
        (self.folder / str(item)).touch()
        deadline = time.monotonic() + 30
        while item < 2 and len(list(self.folder.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self.place


def slow(item: int, progress: ProgressFn) -> None:
    for done in range(13):
        progress(done, 13)
        time.sleep(0.1)


def fail(kind: str) -> Any:
    if kind == "user":
        raise UserError("config.json: not found")
    if kind == "bug":
        raise OverflowError("beyond float16")
    if kind == "vanish":
        os._exit(7)
    if kind == "unpicklable":
        return lambda: None
    os.kill(os.getpid(), getattr(signal, kind))
    return None


def second_fails(item: str, progress: ProgressFn) -> Any:
    """Items are "0", "2": wait for long; "1 KIND": fails so, once the others wait."""
    if " " not in item:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if item == "2" else signal.SIG_DFL)
        time.sleep(60)
    time.sleep(0.3)
    return fail(item.split(" ", 1)[1])


def fail_here(kind: str, progress: ProgressFn) -> Any:
    return fail(kind)


Children = Callable[[], list[psutil.Process]]


def descendants() -> list[psutil.Process]:
    # multiprocessing's resource tracker stays for the life of the process that first spawned.
    return [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]


@pytest.fixture
def children() -> Children:
    """Processes that were not there before the test: one that interprets kernels for other tests may be."""
    before = descendants()
    return lambda: [each for each in descendants() if each not in before]


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_processes_give_what_one_gives(children: Children) -> None:
    arrived: list[int] = []
    here = run_ranks(square, [3, 1, 2], 1, "square", on_result=lambda item, result: arrived.append(item))
    assert arrived == [3, 1, 2]
    spawned = run_ranks(square, [3, 1, 2], 2, "square", on_result=lambda item, result: arrived.append(item))
    assert sorted(arrived[3:]) == [1, 2, 3]
    assert list(here) == list(spawned) == [3, 1, 2]
    assert [result[0] for result in spawned.values()] == [result[0] for result in here.values()] == [9, 1, 4]
    assert {result[1] for result in here.values()} == {os.getpid()}
    assert len({result[1] for result in spawned.values()} - {os.getpid()}) == 3
    assert children() == []


def test_labels_and_small_cases() -> None:
    assert run_ranks(label, ["a", "b"], 1, "label") == {"a": "A", "b": "B"}
    assert run_ranks(square, [], 4, "square") == {}
    assert run_ranks(square, [5], 4, "square") == {5: (25, os.getpid())}
    with pytest.raises(UserError, match="--workers 0: give 1 or more"):
        run_ranks(square, [1], 0, "square")
    with pytest.raises(ValueError, match="not distinct"):
        run_ranks(square, [1, 1], 1, "square")


def test_thread_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "1")  # what the user says holds
    assert run_ranks(threads, [0, 1], 2, "threads", threads_per_worker=5) == {0: ("5", "1"), 1: ("5", "1")}
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("user", UserError, r"^1 user: config\.json: not found$"),
        ("bug", OverflowError, "^beyond float16"),
        ("vanish", RuntimeError, "^1 vanish: its process ended with status 7 and without a result$"),
        ("unpicklable", Exception, "(?i)pickle"),
        ("SIGKILL", UserError, r"^1 SIGKILL: its process was killed by signal 9 \(out of memory\?\)$"),
    ],
)
def test_first_failure_ends_the_others(kind: str, error: type[Exception], message: str, children: Children) -> None:
    start = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        run_ranks(second_fails, ["0", f"1 {kind}"], 2, "fail")
    assert time.monotonic() - start < 5
    assert children() == []
    if kind == "bug":
        notes = "".join(caught.value.__notes__)
        assert notes.startswith(f"in the worker of 1 {kind}:\nTraceback")
        assert "in fail\n" in notes


@pytest.mark.parametrize("error", [TwoArgumentError("here", "there"), SystemExit(3), KeyboardInterrupt("x")])
def test_errors_that_cannot_be_sent_as_they_are(error: BaseException) -> None:
    sent = _portable(error, 7)
    assert type(sent) is RuntimeError
    assert str(sent).endswith(f"{type(error).__name__}: {error}")
    assert sent.__notes__[0].startswith("in the worker of rank 7:\n")


def test_a_worker_that_will_not_end_is_killed(children: Children) -> None:
    start = time.monotonic()
    with pytest.raises(UserError):
        run_ranks(second_fails, ["2", "1 user"], 2, "fail")
    assert time.monotonic() - start < 5
    assert children() == []


def test_failure_in_this_process() -> None:
    with pytest.raises(UserError, match=r"^user: config\.json: not found$"):
        run_ranks(fail_here, ["user"], 1, "fail")
    with pytest.raises(OverflowError, match="beyond float16"):
        run_ranks(fail_here, ["bug"], 1, "fail")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_error_while_committing_ends_the_workers(error: type[BaseException], children: Children) -> None:
    def commit(item: str, result: object) -> None:
        raise error("disk full")

    with pytest.raises(error, match="disk full"):
        run_ranks(quick_and_slow, ["quick", "slow"], 2, "commit", on_result=commit)
    assert children() == []


def quick_and_slow(item: str, progress: ProgressFn) -> bytes:
    time.sleep(60 if item == "slow" else 0)
    return bytes(1 << 20)


SCRIPT = """
import os, sys, time
from test_workers import wait_for_long
from moecompiler.workers import run_ranks
if __name__ == "__main__":
    run_ranks(wait_for_long, [0, 1, 2], 2, "wait")
elif sys.argv[1:] == ["long import"]:
    wait_for_long(0, None)
"""


def wait_for_long(item: int, progress: ProgressFn) -> None:
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    os.write(1, f"{os.getpid()} {blocked}\n".encode())  # at once: two workers write to one pipe
    time.sleep(60)


@pytest.mark.parametrize(
    ("how", "signal_number"),
    [
        ("", signal.SIGINT),
        ("long import", signal.SIGINT),
        ("", signal.SIGTERM),
        ("", signal.SIGKILL),
    ],
)
def test_workers_end_with_their_parent(tmp_path: Path, how: str, signal_number: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert parent.stdout is not None
    lines = [parent.stdout.readline().split() for _ in range(2)]
    pids = [int(pid) for pid, _ in lines]
    assert [blocked for _, blocked in lines] == ["True", "True"]
    if signal_number == signal.SIGINT:
        os.killpg(parent.pid, signal_number)  # as a terminal does: to every process
    else:
        parent.send_signal(signal_number)
    _, errors = parent.communicate(timeout=5)
    assert parent.returncode == -signal_number
    assert gone(pids, 3)
    assert errors.count("Traceback") == (1 if signal_number == signal.SIGINT else 0), errors


def drawn(task: Callable[..., Any], items: list[int], workers: int, terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=100)
    run_ranks(task, items, workers, "build", console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [1, 2])
def test_bars_show_on_a_terminal_after_a_second(workers: int) -> None:
    shown = drawn(slow, list(range(workers)), workers)
    for rank in range(workers):
        assert f"build rank {rank}" in shown
    assert re.search(r" [1-9]\d%", shown)


def test_no_bars_for_what_is_quick_or_no_terminal() -> None:
    assert drawn(square, [0, 1], 1) == ""
    assert drawn(slow, [0], 1, terminal=False) == ""


@pytest.mark.parametrize(("workers", "places"), [(1, {0}), (2, {0, 1})])
def test_each_of_those_at_work_has_a_place_of_its_own(workers: int, places: set[int], tmp_path: Path) -> None:
    if workers == 1:
        (tmp_path / "nobody").touch()  # whom the first need not wait for
        (tmp_path / "nothing").touch()
    task = Placed(tmp_path)
    found = run_ranks(task, [0, 1, 2], workers, "work", placed=task.in_place)
    assert {found[0], found[1]} == places
    assert set(found.values()) == places
