"""How the work of experts falls on ranks, as ``bench --expert_load`` tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moecompiler.artifact import Artifact
from moecompiler.backends.base import EngineLimits
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.generation import GenerationOptions, generate
from moecompiler.runtime.session import closing
from moecompiler.tools.job import Job
from moecompiler.tools.together import together

if TYPE_CHECKING:
    from moecompiler.backends.onnxruntime_routing import CountingSession


@dataclass(frozen=True)
class RankLoad:
    """One rank's share of the tokens of a run, over its layers.

    ``tokens``: pairs of a token and an expert of this rank that it was sent to. ``per_expert``: the same by local expert.
    ``imbalance``: ``tokens`` over the mean of the ranks of its stage; 1 where all have the same.
    """

    rank: int
    experts: tuple[int, int]  # the first local one, and the last
    tokens: int
    per_expert: tuple[int, ...]
    imbalance: float


def check_backend(artifact: Artifact) -> None:
    """Raises: UserError where the engines cannot say where tokens go."""
    backend = artifact.header["backend"]
    if backend != "onnxruntime":
        raise UserError(
            f"--expert_load: engines of backend {backend} do not say where tokens go; those of onnxruntime do"
        )


def measure_load(
    artifact: Artifact,
    communicator: Communicator,
    threads: int,
    prompts: list[list[int]],
    options: GenerationOptions,
) -> list[RankLoad]:
    """Runs the prompts once more, with engines that show their routers; the load of every rank, on every rank."""
    from moecompiler.backends.onnxruntime_routing import load_counting
    from moecompiler.plugins.library import TensorRTPlugins

    job, rank = Job.of(artifact), communicator.rank
    limits = EngineLimits(**artifact.header["limits"])
    top_k = job.model.num_experts_per_tok

    def load() -> CountingSession:
        interpret = TensorRTPlugins().interpret
        return load_counting(artifact.directory, f"rank{rank}", limits, threads, top_k, interpret)

    with closing(together(communicator, load)) as session:
        generate(session, communicator, job.mapping, prompts, options)
        counts = np.sum(list(session.counts.values()), axis=0)
    everyone: list[np.ndarray] = communicator.gather_objects(counts)
    return rank_loads(everyone, job.mapping)


def rank_loads(counts: list[np.ndarray], mapping: Mapping) -> list[RankLoad]:
    """``counts``: every rank's tokens of all experts, ``[experts]``."""
    local = []
    for rank, experts in enumerate(counts):
        each = len(experts) // mapping.moe_ep_size
        first = mapping.moe_ep_rank(rank) * each
        local.append((first, experts[first : first + each]))
    loads = []
    for rank, (first, own) in enumerate(local):
        mean = np.mean([local[peer][1].sum() for peer in mapping.tp_group(rank)])
        tokens, last = int(own.sum()), first + len(own) - 1
        loads.append(RankLoad(rank, (first, last), tokens, tuple(own.tolist()), float(tokens / mean) if mean else 1.0))
    return loads
