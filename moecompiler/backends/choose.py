"""Which backends there are."""

from __future__ import annotations

from moecompiler.backends.base import Backend
from moecompiler.errors import UserError


def backend_names() -> tuple[str, ...]:
    return ("onnxruntime",)


def find_backend(name: str) -> Backend:
    """Imports a backend's library only when it is asked for. Raises UserError where there is no such backend."""
    if name == "onnxruntime":
        from moecompiler.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend()
    raise UserError(f"--backend {name}: there is none of that name; choose from {', '.join(backend_names())}")
