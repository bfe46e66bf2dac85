"""A node alone as a plugin and as its body, on a backend."""

from __future__ import annotations

import tempfile
from pathlib import Path

from moecompiler.comparison.op_level import Programs
from moecompiler.comparison.result import OOTB, PLUGINS
from moecompiler.comparison.runners import OpenProgram
from moecompiler.errors import UserError
from moecompiler.plugin_switches import parse_plugins
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.weights import TensorReader


def node_programs(backend: str, reader: TensorReader, tactic: str = "", threads: int = 0) -> Programs:
    """``reader``: of the node's weights; ``tactic``: the plan of an interpreted plugin (its op's first, if not given).

    Raises: UserError where the backend cannot run nodes alone.
    """
    on, off = parse_plugins("on"), parse_plugins("off")
    openers: dict[str, OpenProgram]
    if backend == "onnxruntime":
        from moecompiler.comparison.interpreted_runner import InterpretedPlugins
        from moecompiler.comparison.runners import BodiesOnOnnxRuntime

        plugins = InterpretedPlugins(reader, TensorRTPlugins(), threads, (tactic,) if tactic else ())
        openers = {PLUGINS: plugins, OOTB: BodiesOnOnnxRuntime(reader, threads)}
    elif backend == "tensorrt":
        from moecompiler.backends.tensorrt import import_tensorrt

        import_tensorrt()
        from moecompiler.tools.comparison.tensorrt import TensorRTPrograms

        folder = Path(tempfile.gettempdir())
        openers = {PLUGINS: TensorRTPrograms(reader, on, folder), OOTB: TensorRTPrograms(reader, off, folder)}
    else:
        raise UserError(f"--backend {backend}: its programs do not run by themselves; give onnxruntime or tensorrt")
    return Programs(openers, frozenset())
