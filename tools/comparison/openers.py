"""Programs with plugins and without, on each backend, as Polygraphy runners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moecompiler.comparison.interpreted_runner import InterpretedPlugins
from moecompiler.comparison.runners import BodiesOnOnnxRuntime, OpenProgram
from moecompiler.errors import UserError
from moecompiler.graph import Program
from moecompiler.plugin_switches import PluginSwitches
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.validation.place import Arrays
from moecompiler.weights import TensorReader

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner


@dataclass(frozen=True)
class PlannedPlugins:
    """Interpreted plugins, each by the plan that ``tactics`` has for its node."""

    reader: TensorReader
    switches: PluginSwitches
    threads: int
    tactics: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, program: Program, examples: Sequence[Arrays]) -> BaseRunner:
        nodes = (node.name for node in program.model.graph.node)
        names = tuple(dict.fromkeys(self.tactics[name] for name in nodes if name in self.tactics))
        made = InterpretedPlugins(self.reader, TensorRTPlugins(), self.threads, names, self.switches)
        return made(program, examples)


def opener_of(
    backend: str,
    switches: PluginSwitches,
    reader: TensorReader,
    directory: Path,
    threads: int,
    tactics: Mapping[str, str] | None = None,
) -> OpenProgram:
    """What runs graphs, and nodes of them, as engines of a backend are run whose plugins are those of ``switches``;
    ``tactics``: node → plan, of interpreted ones. Files go to ``directory`` for as long as they are needed.

    Raises: UserError where programs of the backend cannot be opened by themselves.
    """
    if backend == "onnxruntime":
        if switches.insists:
            return PlannedPlugins(reader, switches, threads, tactics or {})
        return BodiesOnOnnxRuntime(reader, threads)
    if backend == "tensorrt":
        from moecompiler.tools.comparison.tensorrt import TensorRTPrograms

        return TensorRTPrograms(reader, switches, directory)
    raise UserError(f"backend {backend}: its programs do not run here; compare engines of onnxruntime or tensorrt")
