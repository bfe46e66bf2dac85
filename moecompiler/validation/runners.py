"""Polygraphy on one rank: its engine and its torch module, the same inputs, output by output."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from moecompiler.rounded_cache import as_numbers
from moecompiler.validation.difference import relative_error
from moecompiler.validation.place import Arrays, RankPlace
from moecompiler.validation.reference_run import RankStep
from moecompiler.validation.ties import output_margins, routed_otherwise
from moecompiler.validation.tolerances import Tolerance


class ModuleRunner(BaseRunner):
    """Runs a rank's torch module as a Polygraphy runner; ``call`` takes and gives arrays by the graph's names."""

    def __init__(self, call: Callable[[Arrays], Arrays], example: Arrays, name: str):
        super().__init__(name=name, prefix="torch-rank-module")
        self._call, self._example = call, example

    def activate_impl(self) -> None:
        """Nothing to load: the module is."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name, array in self._example.items():
            metadata.add(name, dtype=array.dtype, shape=(None,) * array.ndim)
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, np.ndarray]:
        self.inference_time = 0.0
        return OrderedDict(self._call(feed_dict))

    def deactivate_impl(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True)
class OutputReport:
    """How far one output of one rank is from the reference, the worst of all steps; ``relative`` is ``‖a - b‖ / ‖b‖``. Left out
    are ``rerouted`` of its tokens, which rounding sent to another expert (``ties.routed_otherwise``), with router margins up to
    ``rerouted_margin``."""

    rank: int
    scenario: str
    name: str
    max_abs: float
    relative: float
    passed: bool
    rerouted: int = 0
    rerouted_margin: float = 0.0


def compare_rank(
    place: RankPlace,
    scenario: str,
    runner: Callable[[Arrays], BaseRunner],
    records: Sequence[RankStep],
    tolerance: Tolerance,
) -> list[OutputReport]:
    """Runs one rank's engine on the inputs that its module was run on, rounded to the engine's types
    (``reference_run.run_reference``), and compares all outputs. Its peers must do the same at the same time."""
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # what it would print is in the report
    feeds, ran = [record.feeds for record in records], iter(records)
    module = ModuleRunner(lambda _: next(ran).outputs, feeds[0], name=f"torch module of rank {place.rank}")
    results = Comparator.run([runner(feeds[0]), module], data_loader=feeds)
    numbers = partial(as_numbers, place.quantization, dtype=place.options.dtype)
    for iteration in results[0][1]:  # the engine's
        for name in list(iteration):
            iteration[name] = numbers(name, iteration[name])
    widened = [(name, [_float32(iteration) for iteration in iterations]) for name, iterations in results]
    for (_, iterations), (_, wide) in zip(results, widened, strict=True):
        for iteration, arrays in zip(iterations, wide, strict=True):
            for name, array in arrays.items():
                iteration[name] = array
    statistic = "quantile" if tolerance.outliers else "elemwise"
    quantile = 1 - tolerance.outliers if tolerance.outliers else None
    check = SimpleCompareFunc(
        atol=tolerance.atol, rtol=tolerance.rtol, check_error_stat=statistic, error_quantile=quantile
    )
    verdicts, main, rerouted, margin = _verdicts(results, check), place.main_output, 0, 0.0
    if tolerance.tie and not all(verdict[main] for verdict in verdicts):
        reach = [output_margins(each.margins, each.feeds.get("last_token_ids")) for each in records]
        rerouted, margin = _leave_out_rerouted(results, main, reach, tolerance)
        verdicts = _verdicts(results, check)
    outputs, references = (iterations for _, iterations in results)
    return [
        OutputReport(
            place.rank,
            scenario,
            name,
            max(float(np.abs(a[name] - b[name]).max()) for a, b in zip(outputs, references, strict=True)),
            max(relative_error(a[name], b[name]) for a, b in zip(outputs, references, strict=True)),
            all(verdict[name] for verdict in verdicts),
            rerouted if name == main else 0,
            margin if name == main else 0.0,
        )
        for name in references[0]
    ]


def _verdicts(results: RunResults, check: SimpleCompareFunc) -> list[dict[str, bool]]:
    """Whether each output agrees, step by step."""
    (verdicts,) = Comparator.compare_accuracy(results, compare_func=check)[0].values()
    return [{name: bool(verdict) for name, verdict in each.items()} for each in verdicts]


def _leave_out_rerouted(
    results: RunResults, name: str, margins: Sequence[np.ndarray], tolerance: Tolerance
) -> tuple[int, float]:
    """Takes the tokens that ``routed_otherwise`` finds out of one output of both runners; how many, and their largest margin."""
    outputs, references = (iterations for _, iterations in results)
    values, true = ([iteration[name] for iteration in iterations] for iterations in (outputs, references))
    masks = routed_otherwise(values, true, margins, tolerance)
    for a, b, mask in zip(outputs, references, masks, strict=True):
        # where all are taken out, nothing is left to compare
        a[name], b[name] = (b[name], b[name]) if mask.all() else (a[name][~mask], b[name][~mask])
    left_out = np.concatenate([margin[mask] for margin, mask in zip(margins, masks, strict=True)])
    return left_out.size, float(left_out.max(initial=0.0))


def _float32(iteration: Arrays) -> Arrays:
    return {name: np.asarray(array, dtype=np.float32) for name, array in iteration.items()}


def as_engine_type(array: np.ndarray, ort_type: str) -> np.ndarray:
    """What the engine takes: the reference's float32 is rounded where the engine has a narrower type."""
    wanted = {
        "tensor(float16)": np.float16,
        "tensor(float)": np.float32,
        "tensor(int64)": np.int64,
        "tensor(int8)": np.int8,
    }[ort_type]
    return np.ascontiguousarray(array, dtype=wanted)
