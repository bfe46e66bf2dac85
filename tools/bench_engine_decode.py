"""A whole decode step of one rank's engine, the choice of the token included, against what has to be read for it:
``python -m moecompiler.tools.bench_engine_decode out.json ENGINE_DIR``.

The step is timed by ``moecompiler bench``: from one step's tokens to the next one's. Its floor is reading once, at the bandwidth
that a kernel that only reads reaches in the same run, all weights but the embedding's, of the experts those that are hit, and
keys and values. How many experts a layer's tokens hit is known for one token; for more it is what even routing gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from moecompiler.artifact import Artifact
from moecompiler.checkpoint import expected_tensors
from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Alone, using_communicator
from moecompiler.runtime.sampling import SamplingOptions
from moecompiler.tools.bench import Case, Figures, Request, bench_rank
from moecompiler.tools.job import Job
from moecompiler.tools.kernel_machine import parse_for_gpu, write_rows
from moecompiler.tools.kernel_timing import read_bandwidth
from moecompiler.weights import NUMPY_DTYPES


@dataclass(frozen=True)
class Row:
    """``figures``: what ``bench`` found; ``bytes`` that a step in the middle of the output reads, ``floor`` and ``step`` in
    microseconds, ``share`` of the floor that is reached, ``read``: bytes per second."""

    engine: str
    layers: int
    dtype: str
    figures: dict[str, Any]
    bytes: float
    floor: float
    step: float
    share: float
    read: float


def experts_hit(tokens: int, experts: int, top_k: int) -> float:
    """Of a layer, by tokens that are routed evenly and independently: exact for one token."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def bytes_of_a_step(model: ModelConfig, dtype: str, batch: int, past: float) -> float:
    """What a step of ``batch`` tokens reads, one of each sequence, ``past`` tokens behind it."""
    itemsize = NUMPY_DTYPES[dtype].itemsize
    share = experts_hit(batch, model.num_local_experts, model.num_experts_per_tok) / model.num_local_experts
    weights = 0.0
    for name, shape in expected_tensors(model).items():
        if name != "model.embed_tokens.weight" or model.tie_word_embeddings:
            weights += prod(shape) * (share if ".experts." in name else 1.0)
    cache = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * batch * past
    return itemsize * (weights + cache)


def row_of(engine: str, job: Job, figures: Figures, read: float) -> Row:
    past = figures.input_len + figures.output_len / 2
    count = bytes_of_a_step(job.model, job.export.dtype, figures.batch_size, past)
    floor, step = 1e6 * count / read, 1e6 * figures.step_s
    layers = job.model.num_hidden_layers
    return Row(engine, layers, job.export.dtype, asdict(figures), count, floor, step, floor / step, read)


def table_line(row: Row) -> str:
    sizes = "batch {batch_size}, {input_len} in, {output_len} out".format_map(row.figures)
    return (
        f"{row.engine}: {row.layers} layers, {row.dtype}, {sizes}: step {row.step:.1f} µs, floor {row.floor:.1f} at"
        f" {row.read / 1e12:.2f} TB/s, {100 * row.share:.1f}%; first token"
        f" after {1e3 * row.figures['time_to_first_token_s']:.2f} ms"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="JSON of the row")
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--input_len", type=int, default=128)
    parser.add_argument("--output_len", type=int, default=65)
    parser.add_argument("--runs", type=int, default=5)
    options = parse_for_gpu(parser, arguments)
    case = Case(options.batch_size, options.input_len, options.output_len)
    request = Request(options.engine_dir, (case,), options.runs, 2, SamplingOptions(), 0, False)
    communicator = Alone()
    try:
        job = Job.of(Artifact.open(options.engine_dir, ("engine",)))
        with using_communicator(communicator):
            (figures,) = bench_rank(request, communicator)
    except UserError as error:
        parser.error(str(error))
    row = row_of(options.engine_dir.name, job, figures, read_bandwidth())  # in memory that the engine has given back
    print(table_line(row))
    write_rows(options.output, [row])


if __name__ == "__main__":
    main()
