"""Programs with plugins and without, on each backend, as Polygraphy runners."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moecompiler.comparison.interpreted_runner import InterpretedPlugins
from moecompiler.comparison.runners import BodiesOnOnnxRuntime, OpenProgram
from moecompiler.errors import UserError
from moecompiler.plugin_switches import PluginSwitches
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.weights import TensorReader


def opener_of(
    backend: str,
    switches: PluginSwitches,
    reader: TensorReader,
    directory: Path,
    threads: int,
    tactics: Sequence[str] = (),
) -> OpenProgram:
    """What runs graphs, and nodes of them, as engines of a backend are run whose plugins are those of ``switches``;
    ``tactics``: plans of interpreted ones. Files go to ``directory`` for as long as they are needed.

    Raises: UserError where programs of the backend cannot be opened by themselves.
    """
    if backend == "onnxruntime":
        if switches.insists:
            return InterpretedPlugins(reader, TensorRTPlugins(), threads, tactics, switches)
        return BodiesOnOnnxRuntime(reader, threads)
    if backend == "tensorrt":
        from moecompiler.tools.comparison.tensorrt import TensorRTPrograms

        return TensorRTPrograms(reader, switches, directory)
    raise UserError(f"backend {backend}: its programs do not run here; compare engines of onnxruntime or tensorrt")
