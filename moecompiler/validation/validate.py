"""One rank's part in validating an engine directory; all ranks do theirs at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from moecompiler.artifact import Artifact
from moecompiler.backends.base import Backend
from moecompiler.checkpoint import Source
from moecompiler.quantized import formats_of, numbers_by
from moecompiler.reference import load_rank_module
from moecompiler.rounded_cache import round_cache
from moecompiler.rounded_inputs import round_inputs
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.connections import connected
from moecompiler.runtime.session import StageSession, closing
from moecompiler.runtime.ways import Asked
from moecompiler.validation.engine_run import engine_logits
from moecompiler.validation.engines import open_engine
from moecompiler.validation.localize import PartReport, localize
from moecompiler.validation.place import RankPlace
from moecompiler.validation.quality import Quality, compare, hf_logits, load_hf
from moecompiler.validation.reference_run import RankStep, choose_rows, run_reference
from moecompiler.validation.runners import OutputReport, compare_rank
from moecompiler.validation.scenario import Scenario
from moecompiler.validation.tolerances import Tolerance, against_float


@dataclass(frozen=True)
class Report:
    """What was found. ``parts`` is empty where every output agreed and nobody asked for it; ``quality`` where HF's model was
    not run."""

    tolerance: Tolerance
    outputs: tuple[OutputReport, ...]
    parts: tuple[PartReport, ...]
    quality: tuple[Quality, ...]

    @property
    def passed(self) -> bool:
        reports: tuple[OutputReport | PartReport | Quality, ...] = (*self.outputs, *self.parts, *self.quality)
        return all(each.passed for each in reports)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def validate_rank(
    artifact: Artifact,
    backend: Backend,
    place: RankPlace,
    reader: Source,
    scenarios: Sequence[Scenario],
    tolerance: Tolerance,
    communicator: Communicator,
    *,
    against_hf: bool = True,
    every_part: bool = False,
    threads: int = 0,
    collectives: Asked = Asked.auto,
) -> Report:
    """Compares this rank's engine with its torch module on every scenario, the recombined ranks with HF's model, and, where
    something is out of tolerance on any rank (or ``every_part``), each part of the graph alone. Every rank gets the whole
    report."""
    quantized = partial(numbers_by, place.quantization, dtype=backend.compute_dtype(place.options.dtype))
    module = load_rank_module(place.config, place.mapping, place.rank, place.options, reader, "float32", quantized)
    round_inputs(module, place.quantization, place.options.dtype)
    round_cache(module, place.quantization, place.options.dtype)
    engine = open_engine(artifact, backend, place.rank, threads)
    outputs: list[OutputReport] = []
    records: list[RankStep] = []
    with closing(engine.stage), connected(collectives, communicator, place.mapping, engine.stage):
        if tolerance.tie:
            scenarios = [
                each if each.spare is None else choose_rows(module, place, each, communicator) for each in scenarios
            ]
        for scenario in scenarios:
            steps = scenario.steps()[:_COMPARED_STEPS]
            mine = run_reference(module, place, steps, communicator, engine.types)
            outputs += compare_rank(
                place,
                scenario.name,
                engine.runner,
                mine,
                tolerance,
            )
            records += mine[:1]
        quality = (
            _against_hf(artifact, place, reader, scenarios, tolerance, engine.stage, communicator) if against_hf else []
        )
    mine_passed = all(each.passed for each in outputs) and all(each.passed for each in quality)
    parts: list[PartReport] = []
    if (every_part or not all(communicator.gather_objects(mine_passed))) and engine.open_part:
        parts = localize(artifact.directory, engine.open_part, place, records, tolerance, communicator)
    gathered = communicator.gather_objects((outputs, parts))
    return Report(
        tolerance,
        tuple(report for each, _ in gathered for report in each),
        tuple(report for _, each in gathered for report in each),
        tuple(quality),
    )


# Decoding goes on in `quality`; output by output, prefill and a few steps show what there is to see
_COMPARED_STEPS = 4


def _against_hf(
    artifact: Artifact,
    place: RankPlace,
    reader: Source,
    scenarios: Sequence[Scenario],
    tolerance: Tolerance,
    stage: StageSession,
    communicator: Communicator,
) -> list[Quality]:
    """Every rank runs its engine; the first rank of the last stage compares, and tells all. HF's weights are not quantized."""
    root = place.mapping.world_size - place.mapping.tp_size
    logits = [engine_logits(stage, place.mapping, scenario, communicator) for scenario in scenarios]
    result: list[Quality] = []
    if communicator.rank == root:
        model = load_hf(place.config, artifact.header["source"], reader)
        for scenario, mine in zip(scenarios, logits, strict=True):
            assert mine is not None
            bounds = against_float(tolerance, formats_of(place.quantization), mine[..., 0].size)
            result.append(compare(mine, hf_logits(model, scenario), scenario, bounds))
    return communicator.broadcast(result, root)
