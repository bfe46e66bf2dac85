"""How long Python objects live that TensorRT goes on using: for ever."""

from __future__ import annotations

import ctypes
from typing import Any


def never_freed(thing: Any) -> None:
    """Gives an object a reference that nobody takes back, also when modules are taken down at the interpreter's end."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
