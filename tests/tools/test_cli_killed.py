"""Processes that are killed: a rank while it generates, a compile at many moments."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cli import ENDLESS_TOKENS, SOON, TINY_MIXTRAL, TWO_RANKS, Here, contents, mpi_words, ranks_of, started, wait_for

from moecompiler.tools.main import main

Engines = Callable[[str], Path]
pytestmark = [pytest.mark.xdist_group("killed"), pytest.mark.timeout(120)]


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


@pytest.mark.mpi
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_it_generates_ends_the_other(victim: int, engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "prompt.csv").write_text("1,2,3\n")
    words = mpi_words(2, ("run", "--engine_dir", engines("endless"), "--max_output_len", ENDLESS_TOKENS))
    words[1:1] = ["--stream-buffering", "0"]
    with started([*words, "--input_file", str(tmp_path / "prompt.csv")], tmp_path) as launcher:
        wait_until(lambda: len((tmp_path / "out").read_text().split()) > 10)
        ranks = ranks_of(launcher)
        assert len(ranks) == 2
        ranks[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        status = wait_for(launcher, 30)
        assert time.monotonic() - killed < SOON
        assert not any(process.is_running() for process in ranks.values())
    assert status not in (0, 2)
    said = (tmp_path / "out").read_text() + (tmp_path / "err").read_text()
    assert "signal 9" in said or f"rank {victim}" in said
    assert len((tmp_path / "out").read_text().split()) < ENDLESS_TOKENS


def compile_words(directory: Path, *more: str) -> list[str]:
    return ["compile", "--model_dir", str(TINY_MIXTRAL), "--output_dir", str(directory), *TWO_RANKS, *more]


@pytest.fixture(scope="module")
def whole(engines: Engines) -> Path:
    """What the same compile makes when nobody disturbs it."""
    return engines("ep2")


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def recorded(directory: Path) -> int:
    """How many ranks the manifest there records."""
    try:
        return len(json.loads((directory / "manifest.json").read_text())["ranks"])
    except FileNotFoundError:
        return 0


# when to kill, by what is in the output directory
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "it has begun": lambda out: (out / "export" / ".lock").exists(),
    "a graph is written": lambda out: any((out / "export").glob(".tmp-*rank0.onnx")),
    "one rank of two is exported": lambda out: recorded(out / "export") == 1,
    "a graph is optimized": lambda out: any((out / "optimize").glob(".tmp-*rank*.onnx")),
    "one rank of two is optimized": lambda out: recorded(out / "optimize") == 1,
    "weights are written": lambda out: any(out.glob(".tmp-*rank0.safetensors")),
    "one rank of two is built": lambda out: recorded(out) == 1,
    "the tokenizer is copied": lambda out: (out / "tokenizer").exists(),
}


OFTEN = ("a graph is written", "one rank of two is optimized", "weights are written")


@pytest.mark.parametrize(
    "moment", [pytest.param(each, marks=[] if each in OFTEN else pytest.mark.slow) for each in MOMENTS]
)
def test_a_killed_compile_is_taken_up_again(moment: str, whole: Path, here: Here, tmp_path: Path) -> None:
    directory = tmp_path / "engines"
    if "export" not in moment and moment not in ("it has begun", "a graph is written"):
        # exporting takes seconds; a compile interrupted later finds this
        shutil.copytree(whole / "export", directory / "export")
    context = multiprocessing.get_context("forkserver")  # with torch imported, a compile starts at once
    context.set_forkserver_preload(["moecompiler.export", "moecompiler.tools.main"])
    process = context.Process(target=main, args=(compile_words(directory),))
    process.start()
    try:
        wait_until(lambda: MOMENTS[moment](directory) or process.exitcode is not None, 60)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it could be killed"

    refused = here("run", "--engine_dir", directory, "--max_output_len", 1, "--input_text", "x", "--in_process")
    assert refused.status == 2
    assert here(*compile_words(directory)).status == 0
    assert names(directory) == names(whole)
    assert contents(directory) == contents(whole)


def test_killing_a_compile_ends_its_workers(whole: Path, here: Here, tmp_path: Path) -> None:
    directory = tmp_path / "engines"
    shutil.copytree(whole / "export", directory / "export")
    with started(["moecompiler", *compile_words(directory, "--workers", "2")], tmp_path) as process:
        workers: list[psutil.Process] = []

        def both_work() -> bool:
            workers[:] = [each for each in process.children() if "spawn_main" in " ".join(each.cmdline())]
            return len(workers) == 2

        wait_until(both_work)
        process.kill()
        psutil.wait_procs(workers, SOON)
        assert not any(each.is_running() for each in workers)
    assert here(*compile_words(directory, "--workers", "2")).status == 0
    assert contents(directory) == contents(whole)
