"""What Polygraphy runs an engine on, and compares it with: the inputs of a real run, and what PyTorch computes from them.

    python -m moecompiler.tools.polygraphy.inputs DIR --output_dir OUT [--rank N] [--batch N] [--tokens N] [--steps N]

``DIR``: an engine directory. In ``OUT``: ``inputs.json`` for ``polygraphy run --load-inputs``, a prefill and some decode steps of
a rank, caches as the steps before left them; ``reference.json`` for ``--load-outputs``, from the rank's float32 module.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from moecompiler.artifact import Artifact
from moecompiler.atomic import temporary_path
from moecompiler.backends.base import EngineLimits
from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.threads import run_in_threads
from moecompiler.tools.backend import open_backend
from moecompiler.tools.job import Job, ranks_asked_for
from moecompiler.tools.printing import USER_ERROR, complaint
from moecompiler.tools.text import encode_text
from moecompiler.tools.validate import quantization_of
from moecompiler.validation.reference_run import RankStep
from moecompiler.validation.scenario import Scenario, random_scenario, text_scenario


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes both files, or none; 2 where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence; a quarter of them are prefilled")
    parser.add_argument("--steps", type=int, default=3, help="prefill, and decode steps after it")
    parser.add_argument("--text", type=Path, help="default: heldout.txt beside the checkpoint, or Python's own")
    options = parser.parse_args(arguments)
    try:
        artifact = Artifact.open(options.directory, ("engine",))
        artifact.check()
        ranks_asked_for(artifact.world_size, options.rank)
        if min(options.batch, options.tokens, options.steps) < 1:
            raise UserError("--batch, --tokens, --steps: give 1 or more")
        notes: list[str] = []
        ids = encode_text(artifact, options.text, None, notes)
        scenario = _scenario(artifact, ids, options.batch, options.tokens, options.steps)
        records = run_in_threads(artifact.world_size, lambda each: record(artifact, scenario, options.steps, each))
        write(records[options.rank], options.output_dir)
    except UserError as error:
        print(complaint(str(error)), file=sys.stderr)
        return USER_ERROR
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    shapes = ["×".join(map(str, each.feeds["position_ids"].shape)) for each in records[options.rank]]
    print(f"{options.output_dir}: steps of rank {options.rank}, sequences × tokens: {', '.join(shapes)}")
    return 0


def _scenario(artifact: Artifact, text_ids: Sequence[int], batch: int, tokens: int, steps: int) -> Scenario:
    """Of the text, or of random tokens where there is too little."""
    limits = EngineLimits(**artifact.header["limits"])
    limits = replace(limits, max_batch_size=min(batch, limits.max_batch_size))
    return text_scenario(text_ids, limits, tokens * limits.max_batch_size) or random_scenario(limits, 0, steps - 1)


def record(artifact: Artifact, scenario: Scenario, steps: int, communicator: Communicator) -> list[RankStep]:
    """One rank's steps; its peers must do the same at the same time. Inputs are rounded to the engine's types."""
    from moecompiler.dummy import open_source
    from moecompiler.quantized import numbers_by
    from moecompiler.reference import load_rank_module
    from moecompiler.rounded_cache import round_cache
    from moecompiler.rounded_inputs import round_inputs
    from moecompiler.runtime.session import closing
    from moecompiler.validation.engines import open_engine
    from moecompiler.validation.place import RankPlace
    from moecompiler.validation.reference_run import run_reference

    job, rank = Job.of(artifact), communicator.rank
    backend = open_backend(artifact.header["backend"])
    place = RankPlace(job.model, job.mapping, job.export, rank, quantization_of(artifact, rank))
    engine = open_engine(artifact, backend, rank, threads=1)
    with closing(engine.stage):
        types = engine.types
    quantized = partial(numbers_by, place.quantization, dtype=backend.compute_dtype(job.export.dtype))
    reader = open_source(job.source, job.model)
    module = load_rank_module(job.model, job.mapping, rank, job.export, reader, "float32", quantized)
    round_inputs(module, place.quantization, job.export.dtype)
    round_cache(module, place.quantization, job.export.dtype)
    # of a single sequence they are a view that torch would warn of
    given = [replace(step, position_ids=step.position_ids.copy()) for step in scenario.steps()[:steps]]
    return run_reference(module, place, given, communicator, types)


def write(records: Sequence[RankStep], directory: Path) -> None:
    """Raises: UserError where a file cannot be written."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    outputs = RunResults()
    outputs.add([_arrays(each.outputs) for each in records], runner_name="PyTorch")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staged = {name: temporary_path(directory / name) for name in ("inputs.json", "reference.json")}
        save_json([_arrays(each.feeds) for each in records], str(staged["inputs.json"]))
        outputs.save(str(staged["reference.json"]))
        for name, temporary in staged.items():
            temporary.replace(directory / name)
    except OSError as error:
        raise UserError(f"--output_dir {directory}: cannot be written: {error.strerror or error}") from None


def _arrays(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array) for name, array in named.items()}


if __name__ == "__main__":
    sys.exit(main())
