"""What passes are checked on: programs as they were before any pass, and a way to run them all together on fixed inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeSession
from moecompiler.backends.onnxruntime_program import WeightCache, open_program
from moecompiler.checkpoint import Source
from moecompiler.debugging.observe import observe_rank
from moecompiler.graph import Program, load_program
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.threads import run_in_threads
from moecompiler.validation.engine_run import engine_logits
from moecompiler.validation.place import Arrays, RankPlace
from moecompiler.validation.scenario import Scenario
from moecompiler.validation.tolerances import TOLERANCES, Tolerance
from moecompiler.weights import TensorReader

Outputs = list[np.ndarray]  # one array of logits (or of an output) for each scenario, ``[..., vocab]`` float32


class Subject(Protocol):
    """Programs of one model, one for each rank."""

    @property
    def reader(self) -> TensorReader:
        """Where their weights are."""

    @property
    def weights(self) -> WeightCache:
        """The weights that were read so far."""

    @property
    def tolerance(self) -> Tolerance:
        """How far results may be off."""

    def load(self) -> tuple[Program, ...]:
        """The programs, read anew from their files, rank by rank."""

    def run(self, programs: Sequence[Program]) -> Outputs:
        """Runs all ranks together."""

    def observe(self, programs: Sequence[Program], names: Sequence[str], rank: int) -> Arrays:
        """Inner tensors of one rank's program, on the first of the inputs; see ``observe``."""

    def reference(self) -> Outputs | None:
        """What Hugging Face's model says to the same inputs; None where there is none to ask."""


@dataclass(frozen=True)
class ExportedRanks:
    """The ranks that an export wrote to ``directory``; ``places`` says which ranks of which model."""

    directory: Path
    places: tuple[RankPlace, ...]
    identity: dict[str, object]
    source: Source
    scenarios: tuple[Scenario, ...]
    limits: EngineLimits

    @property
    def reader(self) -> TensorReader:
        return self.source

    @cached_property
    def weights(self) -> WeightCache:
        return WeightCache(self.source)

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[OnnxRuntimeBackend().compute_dtype(self.places[0].options.dtype)]

    def load(self) -> tuple[Program, ...]:
        return tuple(load_program(self.directory / f"rank{place.rank}.onnx") for place in self.places)

    def run(self, programs: Sequence[Program]) -> Outputs:
        """Logits of prefill and every decode step, ``[batch, steps, vocab]``."""
        mapping = self.places[0].mapping
        threads = 1 if mapping.world_size > 1 else 0
        self.weights.make_room({recipe for program in programs for recipe in program.weights.values()})
        sessions = [OnnxRuntimeSession(open_program(each, self.weights, threads), self.limits) for each in programs]

        def run(communicator: Communicator) -> list[np.ndarray | None]:
            session = sessions[communicator.rank]
            return [engine_logits(session, mapping, scenario, communicator) for scenario in self.scenarios]

        last_stage = run_in_threads(mapping.world_size, run)[-1]
        return [logits for logits in last_stage if logits is not None]

    def observe(self, programs: Sequence[Program], names: Sequence[str], rank: int) -> Arrays:
        """In the first prefill."""
        step, mapping = self.scenarios[0].steps()[0], self.places[0].mapping
        return observe_rank(programs, mapping, self.weights, self.limits, step, names, rank)

    @cached_property
    def _reference(self) -> Outputs:
        from moecompiler.validation.quality import hf_logits, load_hf

        model = load_hf(self.places[0].config, self.identity, self.source)
        return [hf_logits(model, scenario) for scenario in self.scenarios]

    def reference(self) -> Outputs | None:
        return self._reference
