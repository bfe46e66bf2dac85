"""Engines that are not ONNX Runtime's are validated through the session's own ``call``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from moecompiler.artifact import Artifact
from moecompiler.backends.base import EngineLimits
from moecompiler.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeSession, open_session
from moecompiler.dummy import open_source
from moecompiler.runtime.communicator import Alone
from moecompiler.tools.job import Job
from moecompiler.validation.reference_run import Arrays, RankPlace, rounded
from moecompiler.validation.scenario import random_scenario
from moecompiler.validation.tolerances import TOLERANCES
from moecompiler.validation.validate import Report, validate_rank
from moecompiler.weights import NUMPY_DTYPES

pytestmark = pytest.mark.xdist_group("validation")


class OtherSession(OnnxRuntimeSession):
    """Runs on given inputs by itself, and may be off by ``error`` in all it gives."""

    def __init__(self, session: onnxruntime.InferenceSession, limits: EngineLimits, error: float):
        super().__init__(session, limits)
        self.error = error
        self.input_types = {
            value.name: np.dtype("int64" if "int64" in value.type else "float32") for value in session.get_inputs()
        }

    def call(self, feeds: Arrays) -> Arrays:
        values = self.session.run(None, feeds)
        return {name: value + self.error for name, value in zip(self._outputs, values, strict=True)}


class OtherBackend(OnnxRuntimeBackend):
    name = "other"

    def __init__(self, error: float):
        self.error = error

    def load(self, directory: Path, stem: str, limits: EngineLimits, threads: int, device: int = 0) -> OtherSession:
        return OtherSession(open_session(directory / f"{stem}.onnx", threads), limits, self.error)


def report(directory: Path, error: float) -> Report:
    artifact = Artifact.open(directory, ("engine",))
    job, limits = Job.of(artifact), EngineLimits(**artifact.header["limits"])
    reader = open_source(job.source, job.model)
    place = RankPlace(job.model, job.mapping, job.export, 0)
    scenarios = [random_scenario(replace(limits, max_batch_size=2), 0)]
    backend = OtherBackend(error)
    return validate_rank(
        artifact, backend, place, reader, scenarios, TOLERANCES["float32"], Alone(), against_hf=False, threads=1
    )


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_call_is_compared(error: float, one_rank: Path) -> None:
    """An engine without parts is not localized, and fails all the same."""
    found = report(one_rank, error)
    assert {each.passed for each in found.outputs} == {error == 0.0}
    assert found.passed == (error == 0.0)
    assert found.parts == ()


def test_rounding_of_inputs() -> None:
    """What the engine rounds the module is given rounded too; numpy's own types stay what they are."""
    x = np.array([1 / 3], np.float32)
    assert rounded(x, np.dtype("float16")).dtype == np.float16
    wide = rounded(x, NUMPY_DTYPES["bfloat16"])
    assert (wide.dtype, wide[0]) == (np.float32, np.float32(0.333984375))
    assert rounded(np.array([3]), np.dtype("int64")).dtype == np.int64
