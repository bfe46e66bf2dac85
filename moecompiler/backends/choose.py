"""Which backends there are."""

from __future__ import annotations

from moecompiler.backends.base import Backend, PluginLibrary
from moecompiler.errors import UserError


def backend_names() -> tuple[str, ...]:
    return ("onnxruntime", "tensorrt", "tensorrt-rtx")


def find_backend(name: str, plugins: PluginLibrary | None = None) -> Backend:
    """Imports a backend's library only when it is asked for; ``plugins``: what a backend with plugins may use.

    Raises: UserError where there is no such backend, or its library is not there.
    """
    if name == "onnxruntime":
        from moecompiler.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend()
    if name == "tensorrt":
        from moecompiler.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(plugins)
    if name == "tensorrt-rtx":
        from moecompiler.backends.tensorrt_rtx import TensorRTRTXBackend

        return TensorRTRTXBackend()
    raise UserError(f"--backend {name}: there is none of that name; choose from {', '.join(backend_names())}")
