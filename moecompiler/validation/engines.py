"""An engine as validation needs it: run on any inputs, caches among them, and as a session that generates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner

from moecompiler.artifact import Artifact
from moecompiler.backends.base import Backend, EngineLimits
from moecompiler.runtime.session import CallableSession, StageSession
from moecompiler.validation.reference_run import Arrays
from moecompiler.validation.runners import ModuleRunner

if TYPE_CHECKING:
    import onnx
    import onnxruntime

_ORT_TYPES = {
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(int8)": "int8",
}


@dataclass(frozen=True)
class Engine:
    """``runner``: makes, from an example of its inputs, what runs one step on given inputs, by the graph's names. ``types``: the
    dtype of each input. ``stage``: the same engine behind the interface of generation. ``open_part``: opens a part of its graph
    as a session of ONNX Runtime; None where it cannot be run in parts."""

    runner: Callable[[Arrays], BaseRunner]
    types: dict[str, np.dtype]
    stage: StageSession
    open_part: Callable[[onnx.ModelProto], onnxruntime.InferenceSession] | None


def open_engine(artifact: Artifact, backend: Backend, rank: int, threads: int) -> Engine:
    """A rank's engine, loaded once. Raises: UserError where it cannot run here."""
    limits, stem = EngineLimits(**artifact.header["limits"]), f"rank{rank}"
    name = f"engine of rank {rank}"
    if backend.name == "onnxruntime":
        from moecompiler.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeSession, open_part, open_session

        assert isinstance(backend, OnnxRuntimeBackend)
        session = open_session(artifact.path(f"{stem}.onnx"), threads, backend.interpret)
        types = {value.name: np.dtype(_ORT_TYPES[value.type]) for value in session.get_inputs()}
        return Engine(
            lambda _: OnnxrtRunner(lambda: session, name=name),
            types,
            OnnxRuntimeSession(session, limits),
            lambda part: open_part(part, artifact.directory, threads, backend.interpret),
        )
    stage = backend.load(artifact.directory, stem, limits, threads, device=rank)
    if not isinstance(stage, CallableSession):
        raise TypeError(f"engines of backend {backend.name} cannot be run on given inputs")
    return Engine(lambda example: ModuleRunner(stage.call, example, name), stage.input_types, stage, None)
