"""The command line as tests call it: in this process where that is no matter, else as its users do."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from moecompiler.tools.main import main

TESTS = Path(__file__).resolve().parent.parent
TINY_MIXTRAL = TESTS / "data" / "tiny-mixtral"
BIN = Path(sys.executable).parent
SOON = 10.0  # seconds within which every process must be gone after an error
PROMPT = "def read_lines(path):"
ENDLESS_TOKENS = 3000  # of the engines that never say end of text

# options of compiles of the shipped model, on one rank and on two
ONE_RANK = ("--dtype", "float32", "--max_seq_len", "128", "--max_input_len", "64", "--max_batch_size", "3")
TWO_RANKS = (*ONE_RANK, "--tp_size", "2", "--moe_ep_size", "2")

# what `mpirun` is told by options on its command line, said by variables: commands of the documentation run as they stand
MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def environment() -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return os.environ | MPI_ENVIRONMENT | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# what Open MPI's launcher and its libevent say, now and then, when ranks end while it still listens to them
_LAUNCHERS_NOISE = re.compile(r"\[[^]]+:\d+\] PMIX ERROR|\[warn\] Epoll ")


@dataclass(frozen=True)
class Output:
    """What a command left behind: its exit status, what it wrote, and how long it took."""

    status: int
    out: str
    err: str
    seconds: float = 0.0

    @property
    def _lines(self) -> list[str]:
        """Of stderr, without the zero that ends what Open MPI says of an abort, behind which a rank's line may stand."""
        return [line.lstrip("\0") for line in self.err.splitlines()]

    @property
    def complaints(self) -> list[str]:
        return [line for line in self._lines if line.startswith("moecompiler: error: ")]

    @property
    def own_lines(self) -> list[str]:
        """The lines of stderr that ``mpirun`` did not write."""
        lines, by_launcher = [], False
        for line in self._lines:
            if line.startswith("-----"):
                by_launcher = not by_launcher
            elif line.strip(" \0") and not by_launcher and not _LAUNCHERS_NOISE.match(line):
                lines.append(line)
        return lines


class Here:
    """Runs the command line in this process; ``capsys`` is the test's."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Output:
        self._capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return Output(status, captured.out, captured.err)


def mpi_words(ranks: int, arguments: tuple[object, ...]) -> list[str]:
    return ["mpirun", "-n", str(ranks), "moecompiler", *map(str, arguments)]


def under_mpi(ranks: int, *arguments: object) -> Output:
    """``mpirun -n RANKS moecompiler ARGUMENTS``. Nothing is left of it when this returns.

    Raises: AssertionError where it does not end.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), time.monotonic()
        with started(mpi_words(ranks, arguments), folder) as launcher:
            status = wait_for(launcher)
        return Output(status, (folder / "out").read_text(), (folder / "err").read_text(), time.monotonic() - begin)


def wait_for(process: psutil.Popen, seconds: float = 60.0) -> int:
    """Its exit status. Raises: AssertionError where it does not end."""
    try:
        return process.wait(seconds)
    except psutil.TimeoutExpired:
        raise AssertionError(f"still runs after {seconds:.0f} s: {' '.join(process.cmdline())}") from None


@contextmanager
def started(words: list[str], folder: Path) -> Iterator[psutil.Popen]:
    """Starts a command whose output goes to ``folder``'s ``out`` and ``err``; whatever is left of it is killed at the end."""
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = psutil.Popen(words, stdout=out, stderr=err, env=environment())
    family = [process]
    try:
        yield process
    finally:
        if process.is_running():
            family += process.children(recursive=True)
        for each in family:
            if each.is_running():
                each.kill()
        process.wait()


def ranks_of(launcher: psutil.Popen, program: str = "moecompiler") -> dict[int, psutil.Process]:
    """The ranks' processes below ``mpirun``, by rank; ``program``: what their words tell them by."""
    found: dict[int, psutil.Process] = {}
    for child in launcher.children(recursive=True):
        try:
            variables, words = child.environ(), child.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if "OMPI_COMM_WORLD_RANK" in variables and any(program in word for word in words):
            found[int(variables["OMPI_COMM_WORLD_RANK"])] = child
    return found


def contents(directory: Path) -> dict[str, bytes]:
    """Every file at or below a directory, by its path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def logits(path: Path, vocabulary: int = 1000) -> np.ndarray:
    """What the graph in a file, as it is, says of two prompts of unequal length; its caches are empty."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, 5))
    given = {"input_ids": ids, "position_ids": np.tile(np.arange(5), (2, 1)), "last_token_ids": np.array([4, 2])}
    caches = {
        each.name: np.zeros((2, *each.shape[1:]), np.float32) for each in session.get_inputs() if each.name not in given
    }
    (result,) = session.run(["logits"], given | caches)
    return np.asarray(result)
