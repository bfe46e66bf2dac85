"""A node alone as a plugin and as its body, on a backend."""

from __future__ import annotations

from moecompiler.comparison.op_level import Programs
from moecompiler.comparison.result import OOTB, PLUGINS
from moecompiler.errors import UserError
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.weights import TensorReader


def node_programs(backend: str, reader: TensorReader, threads: int = 0) -> Programs:
    """``reader``: of the nodes' weights. Raises: UserError where the backend has no plugins."""
    from moecompiler.comparison.interpreted_runner import InterpretedPlugins
    from moecompiler.comparison.runners import BodiesOnOnnxRuntime

    if backend != "onnxruntime":
        raise UserError(f"--backend {backend}: nodes are not run alone with it; give onnxruntime")
    plugins = InterpretedPlugins(reader, TensorRTPlugins(), threads)
    return Programs({PLUGINS: plugins, OOTB: BodiesOnOnnxRuntime(reader, threads)}, frozenset())
