"""Alternates batches and lengths on an engine for long: memory has to stay flat, and a fixed prompt's tokens the same.

    python -m moecompiler.tools.gpu_soak ROWS.json ENGINE_DIR [--turns 2000] [--warmup 520]

A turn is a prefill and some decode steps of one batch. Batches and lengths have a period below the warm-up's, so that after it
nothing is new. The free memory is the whole GPU's: let nothing else run on it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from moecompiler.artifact import Artifact
from moecompiler.atomic import write_json_atomic
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Alone
from moecompiler.runtime.generation import GenerationOptions, generate
from moecompiler.runtime.session import StageSession, closing
from moecompiler.tools.job import Job
from moecompiler.tools.run import load_rank

STEPS, FIXED_STEPS = 4, 16
FIXED_EVERY = 40  # turns
WARMUP = 520  # turns: 8 batches of 63 lengths are 504 shapes


@dataclass(frozen=True)
class Result:
    """``free_before`` and ``free_after`` the turns that follow the warm-up, and the least in between, in bytes; ``fixed_runs``:
    how often the fixed prompt ran, ``fixed_changed``: how often its tokens were others."""

    turns: int
    warmup: int
    shapes: int
    seconds: float
    free_before: int
    free_least: int
    free_after: int
    fixed_runs: int
    fixed_changed: int

    @property
    def passed(self) -> bool:
        return self.free_least >= self.free_before and not self.fixed_changed and self.fixed_runs > 1


def shape(turn: int, session: StageSession) -> tuple[int, int]:
    """Sequences and tokens of each. An odd number of lengths meets all batches, which are mostly a power of two."""
    longest = min(session.max_input_len, session.max_seq_len - max(STEPS, FIXED_STEPS))
    longest -= longest % 2 == 0
    return turn % session.max_batch_size + 1, 37 * turn % longest + 1


def soak(session: StageSession, mapping: Mapping, turns: int, warmup: int, free: Callable[[], int]) -> Result:
    """``free``: bytes of the device's memory that nobody has."""
    rng = np.random.default_rng(0)
    longest = min(20, session.max_input_len, session.max_seq_len - FIXED_STEPS)
    lengths = [max(1, longest - 6 * row) for row in range(min(3, session.max_batch_size))]
    fixed = [rng.integers(0, session.vocab_size, length).tolist() for length in lengths]
    said: list[list[list[int]]] = []
    memory: list[int] = []
    begin = perf_counter()
    for turn in range(turns):
        prompts = rng.integers(0, session.vocab_size, shape(turn, session)).tolist()
        generate(session, Alone(), mapping, prompts, GenerationOptions(STEPS))
        if turn % FIXED_EVERY == 0 or turn == turns - 1:
            said.append(generate(session, Alone(), mapping, fixed, GenerationOptions(FIXED_STEPS)).output_ids)
        if turn >= warmup:
            memory.append(free())
    shapes = len({shape(turn, session) for turn in range(turns)})
    changed = sum(each != said[0] for each in said)
    seconds = perf_counter() - begin
    return Result(turns, warmup, shapes, seconds, memory[0], min(memory), memory[-1], len(said), changed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of the result")
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=WARMUP, help="turns before memory is looked at (%(default)s)")
    options = parser.parse_args(arguments)
    if not 0 <= options.warmup < options.turns:
        parser.error("--turns has to be more than --warmup")
    try:
        artifact = Artifact.open(options.engine_dir, ("engine",))
        if artifact.world_size != 1:
            parser.error(f"{options.engine_dir}: has {artifact.world_size} ranks; give an engine of one")
        with closing(load_rank(artifact, 0, 1, True)) as session:
            result = soak(session, Job.of(artifact).mapping, options.turns, options.warmup, free_memory)
    except UserError as error:
        parser.error(str(error))
    write_json_atomic(options.output, asdict(result) | {"passed": result.passed})
    print(report(result))
    return int(not result.passed)


def free_memory() -> int:
    """Of the current GPU, in bytes."""
    from moecompiler.runtime.device import checked, driver

    return int(checked(driver().cuMemGetInfo())[0])


def report(result: Result) -> str:
    lost = result.free_before - result.free_least
    return (
        f"{result.turns} turns of {result.shapes} shapes in {result.seconds:.1f} s: free memory {result.free_before} bytes after"
        f" {result.warmup} turns, {result.free_after} at the end, {lost} less in between; fixed prompt {result.fixed_runs} times,"
        f" {result.fixed_changed} of them other tokens: {'ok' if result.passed else 'NOT FLAT OR NOT THE SAME'}"
    )


if __name__ == "__main__":
    sys.exit(main())
