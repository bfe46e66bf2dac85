"""Generates for long on several ranks, as processes under ``mpirun``: device memory has to stay flat.

    python -m moecompiler.tools.gpu_long ROWS.json ENGINE_DIR [--tokens 2000] [--warmup 50]

One prompt after another is continued, each as far as the engine goes. The free memory is the whole GPU's, as each rank sees it
after a step: let nothing else run on it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from moecompiler.artifact import Artifact
from moecompiler.atomic import write_json_atomic
from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.connections import connected
from moecompiler.runtime.generation import GenerationOptions, generate
from moecompiler.runtime.mpi import launched_rank
from moecompiler.runtime.session import closing
from moecompiler.runtime.ways import Asked
from moecompiler.tools.engine_dirs import open_engines
from moecompiler.tools.gpu_soak import free_memory
from moecompiler.tools.job import Job
from moecompiler.tools.launched import run_launched
from moecompiler.tools.launcher import Here, find_mpirun, launch_command, launcher_of
from moecompiler.tools.run import load_rank

PROMPT, AGAIN = 16, 64  # tokens
_WATCHDOG_SECONDS = 30.0


@dataclass(frozen=True)
class Result:
    """``free_first``, ``free_least``: bytes of the GPU that nobody had, after the warm-up and least from there on, by rank.
    ``ways``: which way ranks exchanged what. ``same``: the first prompt's text began in the same way again."""

    tokens: int
    warmup: int
    seconds: float
    free_first: list[int]
    free_least: list[int]
    ways: list[str]
    same: bool

    @property
    def passed(self) -> bool:
        return self.same and all(least >= first for first, least in zip(self.free_first, self.free_least, strict=True))


def generate_for_long(engine_dir: Path, tokens: int, warmup: int, communicator: Communicator) -> Result:
    """One rank's part. At the end the beginning of the first prompt's text is made again."""
    artifact, place = open_engines(engine_dir, communicator)
    job, free = Job.of(artifact), list[int]()
    with (
        closing(load_rank(artifact, place.rank, 1, True, place.local_rank)) as session,
        connected(Asked.auto, communicator, job.mapping, session) as ways,
    ):

        def continued(seed: int, steps: int) -> list[int]:
            prompt = np.random.default_rng(seed).integers(0, session.vocab_size, PROMPT).tolist()
            options = GenerationOptions(steps)
            note = partial(_note, free)
            return generate(session, communicator, job.mapping, [prompt], options, note).output_ids[0]

        most, begin = session.max_seq_len - PROMPT, perf_counter()
        first = continued(0, most)
        while len(free) < tokens:
            continued(len(free), most)
        seconds, steps = perf_counter() - begin, len(free)
        same = continued(0, min(AGAIN, most)) == first[:AGAIN]
    everyone = communicator.gather_objects((free[warmup], min(free[warmup:])))
    return Result(steps, warmup, seconds, [a for a, _ in everyone], [b for _, b in everyone], ways, same)


def _note(free: list[int], step: int, tokens: dict[int, int]) -> None:
    free.append(free_memory())


def _run_rank(options: argparse.Namespace, communicator: Communicator) -> Result:
    """Rank 0 writes and says what came of it."""
    result = generate_for_long(options.engine_dir, options.tokens, options.warmup, communicator)
    if communicator.rank == 0:
        write_json_atomic(options.output, asdict(result) | {"passed": result.passed})
        print(report(result), flush=True)
    return result


def report(result: Result) -> str:
    """One line for people."""
    lost = max(first - least for first, least in zip(result.free_first, result.free_least, strict=True))
    flat = "ok" if result.passed else "NOT FLAT OR NOT THE SAME"
    return (
        f"{result.tokens} tokens on {len(result.free_first)} ranks in {result.seconds:.1f} s: after {result.warmup} of them"
        f" {result.free_first[0]} bytes free, {lost} less in between; {'; '.join(result.ways)}: {flat}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of the result")
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--tokens", type=int, default=2000, help="at least, over all prompts (%(default)s)")
    parser.add_argument("--warmup", type=int, default=50, help="tokens before memory is looked at (%(default)s)")
    options = parser.parse_args(arguments)
    if not 0 <= options.warmup < options.tokens:
        parser.error("--tokens has to be more than --warmup")
    try:
        if launched_rank(os.environ) is None:
            ranks = Artifact.open(options.engine_dir, ("engine",)).world_size
            path = find_mpirun(None)
            here = Here(os.geteuid() == 0, len(os.sched_getaffinity(0)))
            words = [str(word) for word in (arguments if arguments is not None else sys.argv[1:])]
            program = [sys.executable, "-m", "moecompiler.tools.gpu_long", *words]
            os.execv(path, launch_command(launcher_of(path), str(path), ranks, [], here, program))
        result = run_launched(os.environ, lambda ranks: _run_rank(options, ranks), _WATCHDOG_SECONDS)
    except UserError as error:
        parser.error(str(error))
    return int(not result.passed)


if __name__ == "__main__":
    sys.exit(main())
