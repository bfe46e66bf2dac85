"""The backend of a name, with the plugins it may use."""

from __future__ import annotations

from moecompiler.backends.base import Backend
from moecompiler.backends.choose import find_backend
from moecompiler.plugins.library import TensorRTPlugins


def open_backend(name: str) -> Backend:
    """Raises: UserError where there is no such backend, or its library is not there."""
    return find_backend(name, TensorRTPlugins())
