"""TensorRT-RTX's builder: ONNX file → plan, for cards that need not be here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

from moecompiler.backends.tensorrt_messages import explain
from moecompiler.errors import UserError
from moecompiler.weights import Shape

Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input → least, typical, largest shape
_LIBRARY = "TensorRT-RTX"


class _Log(trt.ILogger):
    """Keeps errors and warnings, in order, instead of printing them."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self.errors.append(message)
        elif severity == trt.ILogger.WARNING:
            self.warnings.append(message)


class _Monitor(trt.IProgressMonitor):
    """The steps done of the outermost phase, as a fraction; called from several threads."""

    def __init__(self, progress: Callable[[float], None]):
        trt.IProgressMonitor.__init__(self)
        self._progress = progress
        self._outermost: tuple[str, int] | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if parent_phase is None:
            self._outermost = phase_name, max(1, num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        if self._outermost is not None and self._outermost[0] == phase_name:
            self._progress(min(1.0, (step + 1) / self._outermost[1]))
        return True

    def phase_finish(self, phase_name: str) -> None:
        if self._outermost is not None and self._outermost[0] == phase_name:
            self._outermost = None


@dataclass(frozen=True)
class Plan:
    """``data``: the serialized engine."""

    data: Any
    warnings: tuple[str, ...]


def capabilities(names: Sequence[str]) -> list[Any]:
    """Compute capabilities (``8.9``) as TensorRT-RTX names them. Raises: UserError where it does not build for one."""
    known = {
        f"{name[2:-1]}.{name[-1]}": member
        for name, member in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    for name in names:
        if name not in known:
            raise UserError(
                f"--compute_capability {','.join(names)}: {_LIBRARY} {trt.__version__} builds for {', '.join(known)}, not {name}"
            )
    return [known[name] for name in names]


def build_plan(
    model: Path,
    profiles: Sequence[Profile],
    nodes: Sequence[str],
    compute_capabilities: Sequence[str],
    progress: Callable[[float], None],
) -> Plan:
    """Parses ``model``, whose weights' files beside it are mapped, and builds its engine, strongly typed; ``nodes``: names of the
    graph's nodes, to say where an error is.

    Raises: UserError where TensorRT-RTX does not parse or build it, with the node's HF module.
    """
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        complaints = [_complaint(parser.get_error(index)) for index in range(parser.num_errors)]
        raise UserError(explain("cannot read the graph", complaints or log.errors, nodes, _LIBRARY))
    config = builder.create_builder_config()
    config.progress_monitor = monitor = _Monitor(progress)
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    chosen = capabilities(compute_capabilities)
    config.num_compute_capabilities = len(chosen)
    for index, capability in enumerate(chosen):
        config.set_compute_capability(capability, index)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, typical, largest) in shapes.items():
            profile.set_shape(name, least, typical, largest)
        config.add_optimization_profile(profile)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise UserError(explain("cannot build the engine", log.errors, nodes, _LIBRARY))
    del monitor
    return Plan(data, tuple(log.warnings))


def _complaint(error: Any) -> str:
    """What the parser says of a node, and of the function's node that holds it."""
    place = " in ".join(each for each in (error.node_name(), *reversed(error.local_function_stack())) if each)
    return f"{place} ({error.node_operator()}): {error.desc()}"
