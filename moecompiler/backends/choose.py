"""Which backends there are."""

from __future__ import annotations

from collections.abc import Callable

from moecompiler.backends.base import Backend, PluginLibrary
from moecompiler.errors import UserError
from moecompiler.graph import Program


def backend_names() -> tuple[str, ...]:
    return ("onnxruntime", "tensorrt", "tensorrt-rtx")


def find_backend(
    name: str,
    plugins: PluginLibrary | None = None,
    tidy: Callable[[Program], Program] = lambda program: program,
    device: int = 0,
) -> Backend:
    """Imports a backend's library only when it is asked for; ``plugins``: what a backend with plugins may use; ``tidy``: what it
    does to a graph in which it has inlined bodies; ``device``: the GPU that it builds on, where it needs one, counted round.

    Raises: UserError where there is no such backend, or its library is not there.
    """
    if name == "onnxruntime":
        from moecompiler.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(plugins)
    if name == "tensorrt":
        from moecompiler.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(plugins, tidy, device)
    if name == "tensorrt-rtx":
        from moecompiler.backends.tensorrt_rtx import TensorRTRTXBackend

        return TensorRTRTXBackend()
    raise UserError(f"--backend {name}: there is none of that name; choose from {', '.join(backend_names())}")
