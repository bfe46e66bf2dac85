"""TensorRT's builder: ONNX file → plan. Works with the interface that TensorRT 10.6 to 11 share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tensorrt as trt

from moecompiler.backends.tensorrt_messages import explain
from moecompiler.errors import UserError
from moecompiler.runtime.lifetime import never_freed
from moecompiler.weights import Shape

Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input → least, typical, largest shape


class Log(trt.ILogger):
    """Keeps what TensorRT complains of instead of printing it; ``errors`` and ``warnings`` in order."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self.errors.append(message)
        elif severity == trt.ILogger.WARNING:
            self.warnings.append(message)


@cache
def process_log() -> Log:
    """The one log of this process, never given back: TensorRT goes on using the first that it was given for as long as it lives,
    whatever it is given later."""
    log = Log()
    never_freed(log)
    return log


class Monitor(trt.IProgressMonitor):
    """Turns the phases of a build, which nest, into one fraction; TensorRT calls it from several threads."""

    def __init__(self, progress: Callable[[float], None]):
        trt.IProgressMonitor.__init__(self)
        self._progress, self._lock = progress, threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name → (parent, steps, steps done)
        self._shown = 0.0

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            self._phases[phase_name] = (parent_phase, max(1, num_steps), 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._lock:
            if phase_name in self._phases:
                parent, steps, _ = self._phases[phase_name]
                self._phases[phase_name] = (parent, steps, step + 1)
                self._show(phase_name)
        return True

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            self._phases.pop(phase_name, None)

    def _show(self, phase: str) -> None:
        parent, steps, done = self._phases[phase]
        fraction = min(1.0, done / steps)
        while parent in self._phases:
            parent, steps, done = self._phases[parent]
            fraction = min(1.0, (done + fraction) / steps)
        if fraction > self._shown:  # a later phase of the same level begins anew
            self._shown = fraction
            self._progress(fraction)


@dataclass(frozen=True)
class Plan:
    """``data``: the serialized engine; ``timing``: what was timed, for later builds; ``layers``: the engine's layers, JSON."""

    data: Any
    timing: bytes
    layers: str
    warnings: tuple[str, ...] = field(default=())


def build_plan(
    model: Path,
    profiles: Sequence[Profile],
    nodes: Sequence[str],
    timings: Sequence[bytes],
    in_place: bool,
    progress: Callable[[float], None],
) -> Plan:
    """Parses ``model`` (weights in files beside it) and builds its engine, strongly typed.

    ``nodes``: names of the graph's nodes, to say where an error is. ``timings``: timing caches of earlier builds. ``in_place``:
    whether plugins write outputs over inputs.

    Raises: UserError where TensorRT does not parse or build it, with the node's HF module.
    """
    log = process_log()
    errors, warnings = len(log.errors), len(log.warnings)
    builder = trt.Builder(log)
    network = builder.create_network(_flags())
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        raise UserError(explain("cannot read the graph", _parser_errors(parser) or log.errors[errors:], nodes))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = monitor = Monitor(progress)
    if in_place:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    for each in profiles:
        config.add_optimization_profile(_profile(builder, each))
    cache = _timing_cache(config, timings)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise UserError(explain("cannot build the engine", log.errors[errors:], nodes))
    del monitor
    return Plan(data, bytes(cache.serialize()), _layers(data, log), tuple(log.warnings[warnings:]))


def _flags() -> int:
    """Strongly typed: every tensor has the graph's type. A release without the flag knows no other way."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parser_errors(parser: Any) -> list[str]:
    texts = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        stack = [*error.local_function_stack()] if hasattr(error, "local_function_stack") else []
        place = " in ".join(str(each) for each in (error.node_name(), *reversed(stack)) if each)
        texts.append(f"{place} ({error.node_operator()}): {error.desc()}")
    return texts


def _profile(builder: Any, shapes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    for name, (least, typical, largest) in shapes.items():
        profile.set_shape(name, least, typical, largest)
    return profile


def _timing_cache(config: Any, timings: Sequence[bytes]) -> Any:
    """One cache of what earlier builds timed; those of another version or GPU are passed over."""
    cache = config.create_timing_cache(b"")
    for each in timings:
        other = config.create_timing_cache(each)
        if other is not None:
            cache.combine(other, ignore_mismatch=False)
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _layers(data: Any, log: Log) -> str:
    """What the engine inspector says of every layer: its name, kernel, shapes."""
    errors, runtime = len(log.errors), trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise UserError(explain("cannot load the engine it built", log.errors[errors:], ()))
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
