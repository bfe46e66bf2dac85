"""What is compared: one model's engines with plugins and without, or two artifacts of one model."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moecompiler.artifact import Artifact
from moecompiler.backends.base import EngineLimits
from moecompiler.backends.interpreted_node import INTERPRETED_SM
from moecompiler.backends.tensorrt_program import choose_plugins
from moecompiler.comparison.nodes import is_op_node
from moecompiler.comparison.result import OOTB, PLUGINS, A, B
from moecompiler.errors import UserError
from moecompiler.graph import load_program
from moecompiler.passes.pipelines import PLUGINS as PLUGINS_PIPELINE
from moecompiler.plugin_switches import Mode, PluginSwitches, parse_plugins
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.tools.build import check_engine, resolve_limits, run_build
from moecompiler.tools.flags import EngineFlags, InstrumentFlags, SelectionFlags, WorkFlags
from moecompiler.tools.job import Job, check_engine_dir
from moecompiler.tools.optimize import run_optimize

_ENGINE_STAGES, _GRAPH_STAGES = ("engine",), ("optimize", "export")


@dataclass(frozen=True)
class Planned:
    """What engines that are not built would be: ``plugins``: node → op."""

    backend: str
    limits: EngineLimits
    plugins: dict[str, str]


@dataclass(frozen=True)
class Side:
    """A program of a comparison: its engines, and the optimized graphs that they were built from, None where these are not at
    hand. ``switches``: which of its nodes are plugins; ``build_seconds``: None where the engines were there. ``planned``:
    where nodes alone are looked at, for which whole engines are not built; ``engines`` are then the graphs."""

    name: str
    label: str
    engines: Artifact
    source: Artifact | None
    switches: PluginSwitches
    build_seconds: float | None = None
    planned: Planned | None = None

    @property
    def job(self) -> Job:
        return Job.of(self.engines)

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(**self.engines.header["limits"]) if self.planned is None else self.planned.limits

    @property
    def backend(self) -> str:
        return str(self.engines.header["backend"]) if self.planned is None else self.planned.backend

    @property
    def plugins(self) -> dict[str, str]:
        """Node → op, of all ranks."""
        return self._recorded("plugins") if self.planned is None else self.planned.plugins

    @property
    def tactics(self) -> dict[str, str]:
        """Node → plan, of plugins whose plans are chosen by name: interpreted ones."""
        return self._recorded("tactics")

    def _recorded(self, key: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for rank in range(self.engines.world_size):
            found |= self.engines.rank_info(rank).get("engine", {}).get(key, {})
        return found


def open_graphs(directory: Path, work_dir: Path) -> tuple[Artifact, Artifact | None, bool]:
    """The optimized graphs of an artifact, with the fused ops that plugins stand for; the engines that lie with them, if it is
    such; and whether these are of those graphs. Graphs without fused ops are made anew from the export, in ``work_dir``.

    Raises: UserError where there are none.
    """
    found = Artifact.open(directory, (*_ENGINE_STAGES, *_GRAPH_STAGES))
    engines = found if found.stage == "engine" else None
    for candidate in (found, *_beside(found)):
        if candidate.stage == "optimize" and _has_fused_ops(candidate):
            return candidate, engines, True
        if candidate.stage == "export":
            return _optimized(candidate, work_dir / "optimize"), engines, False
    raise UserError(
        f"{directory}: there are no graphs with fused ops, which plugins could stand for: give a directory of `optimize` or"
        " `compile` with --pipeline plugins, or one of `export`"
    )


def _beside(found: Artifact) -> list[Artifact]:
    """What a compile leaves in the engine directory."""
    artifacts = []
    for stage in ("optimize", "export"):
        with suppress(UserError):
            artifacts.append(Artifact.open(found.directory / stage, (stage,)))
    return artifacts


def _has_fused_ops(artifact: Artifact) -> bool:
    model = load_program(artifact.path("rank0.onnx")).model
    return any(is_op_node(node) for node in model.graph.node)


def _optimized(export: Artifact, directory: Path) -> Artifact:
    passes = replace(SelectionFlags(), pipeline=PLUGINS_PIPELINE)
    run_optimize(export, directory, passes, InstrumentFlags(), WorkFlags())
    return Artifact.open(directory, ("optimize",))


def with_and_without_plugins(
    directory: Path,
    work_dir: Path,
    engine: EngineFlags,
    told: Callable[[str], None],
    *,
    chosen_backend: bool,
    whole: bool,
) -> tuple[Side, Side]:
    """Both programs from the same graphs. Engines that ``directory`` holds are taken where they are one of the two; what is
    missing is built in ``work_dir``, with their limits, if ``whole`` engines are needed. ``chosen_backend``: that of ``engine``
    was asked for.

    Raises: UserError where that cannot be.
    """
    source, engines, same = open_graphs(directory, work_dir)
    max_seq_len = None
    if engines is not None and not (chosen_backend and engine.backend != engines.header["backend"]):
        limits = engines.header["limits"]
        engine = replace(
            engine,
            backend=engines.header["backend"],
            max_batch_size=limits["max_batch_size"],
            max_input_len=limits["max_input_len"],
            max_num_tokens=limits["max_num_tokens"],
        )
        max_seq_len = limits["max_seq_len"]
    else:
        same = False
    plugins = engine.plugins
    if plugins == "auto" and engine.backend == "onnxruntime":
        plugins = "on"
    sides = []
    for name, switches in ((PLUGINS, plugins), (OOTB, "off")):
        flags = replace(engine, plugins=switches)
        if engines is not None and same and _is_built_so(engines, name, engine.plugins):
            sides.append(Side(name, directory.name, engines, source, switches_of(engines)))
        elif not whole:
            sides.append(_planned(name, source, flags, max_seq_len))
        else:
            sides.append(_built(name, source, work_dir / name, flags, max_seq_len, told))
    first, second = sides
    if not first.plugins:
        raise UserError(f"{directory}: none of its nodes runs as a plugin with --plugins {plugins}: nothing to compare")
    return first, second


def _planned(name: str, source: Artifact, engine: EngineFlags, max_seq_len: int | None) -> Side:
    """Which nodes would be plugins; checked as a build checks it."""
    job, switches = Job.of(source), parse_plugins(engine.plugins)
    check_engine(job, engine, max_seq_len)
    plugins: dict[str, str] = {}
    if switches.mode("", "") is not Mode.OFF or switches.insists:
        sm = INTERPRETED_SM if engine.backend == "onnxruntime" else _gpu_sm()
        for rank in range(source.world_size):
            model = load_program(source.path(f"rank{rank}.onnx")).model
            chosen, _ = choose_plugins(model, switches, job.export.dtype, sm, TensorRTPlugins())
            ours = {node.name for node in model.graph.node if is_op_node(node)}
            plugins |= {node: op for node, op in chosen.items() if node in ours}
    planned = Planned(engine.backend, resolve_limits(job, engine, max_seq_len), plugins)
    return Side(name, name, source, source, switches, None, planned)


def _gpu_sm() -> int:
    from moecompiler.runtime.device import Device

    return Device().info().sm


def _is_built_so(engines: Artifact, name: str, asked: str) -> bool:
    """Whether engines are one of the two programs; those with plugins only where nobody asks for certain ones."""
    has = bool(Side("", "", engines, None, PluginSwitches()).plugins)
    return has and asked == "auto" if name == PLUGINS else not has


def _built(
    name: str,
    source: Artifact,
    directory: Path,
    engine: EngineFlags,
    max_seq_len: int | None,
    told: Callable[[str], None],
) -> Side:
    check_engine_dir(directory)
    told(f"building {name}")
    keys = _keys(directory)
    begin = time.perf_counter()
    run_build(source, directory, engine, WorkFlags(), max_seq_len)
    seconds = time.perf_counter() - begin
    engines = Artifact.open(directory, _ENGINE_STAGES)
    there = _keys(directory) == keys
    return Side(name, name, engines, source, parse_plugins(engine.plugins), None if there else seconds)


def _keys(directory: Path) -> dict[int, Any]:
    with suppress(UserError):
        return {rank: record.key for rank, record in Artifact.open(directory, _ENGINE_STAGES).manifest.ranks.items()}
    return {}


def two_artifacts(
    directories: tuple[Path, Path], work_dir: Path, engine: EngineFlags, told: Callable[[str], None]
) -> tuple[Side, Side]:
    """Engines as they are, or built from graphs as ``--backend`` and ``--plugins`` say.

    Raises: UserError where they are not of one model.
    """
    sides = []
    for name, directory in zip((A, B), directories, strict=True):
        found = Artifact.open(directory, (*_ENGINE_STAGES, *_GRAPH_STAGES))
        label = directory.absolute().name
        if found.stage == "engine":
            with suppress(UserError):
                source = Artifact.open(directory / "optimize", ("optimize",))
                sides.append(Side(name, label, found, source, switches_of(found)))
                continue
            sides.append(Side(name, label, found, None, switches_of(found)))
            continue
        if found.stage == "export":
            found = _optimized(found, work_dir / f"{name}.optimize")
        sides.append(replace(_built(name, found, work_dir / name, engine, None, told), label=label))
    first, second = sides
    if _model(first) != _model(second):
        raise UserError(f"{directories[0]} and {directories[1]} are of different models: give two artifacts of one")
    return first, second


def _model(side: Side) -> Any:
    """But for the dtype that the checkpoint says."""
    return {key: value for key, value in side.job.model.to_json().items() if key != "dtype"}


def switches_of(engines: Artifact) -> PluginSwitches:
    """Exactly the plugins that engines have."""
    names = list(Side("", "", engines, None, PluginSwitches()).plugins)
    return parse_plugins(",".join(("off", *(f"@{name}=on" for name in names))))
