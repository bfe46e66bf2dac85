"""Programs with plugins and without, on each backend, as Polygraphy runners."""

from __future__ import annotations

from pathlib import Path

from moecompiler.comparison.interpreted_runner import InterpretedPlugins
from moecompiler.comparison.runners import BodiesOnOnnxRuntime, OpenProgram
from moecompiler.errors import UserError
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.tools.comparison.sides import Side
from moecompiler.weights import TensorReader


def opener_of(side: Side, reader: TensorReader, directory: Path, threads: int) -> OpenProgram:
    """What runs graphs, and nodes of them, as a side's engines do; files go to ``directory`` for as long as they are needed.

    Raises: UserError where programs of the backend cannot be opened by themselves.
    """
    if side.backend == "onnxruntime":
        if side.switches.insists:
            return InterpretedPlugins(reader, TensorRTPlugins(), threads, side.tactics, side.switches)
        return BodiesOnOnnxRuntime(reader, threads)
    if side.backend == "tensorrt":
        from moecompiler.tools.comparison.tensorrt import TensorRTPrograms

        return TensorRTPrograms(reader, side.switches, directory)
    raise UserError(f"backend {side.backend}: its programs do not run here; compare engines of onnxruntime or tensorrt")
