"""How long a plugin's Python object lives: for ever."""

from __future__ import annotations

import ctypes
from typing import Any


def never_freed(plugin: Any) -> None:
    """Gives the object a reference that nobody takes back.

    TensorRT deletes the C++ half of a plugin itself, and the destructor of that half (``~PyIPluginV3Impl`` in TensorRT's Python
    bindings) lets go of the Python object. Was that the last reference, Python frees the C++ half once more. It happens to what a
    context made of a plugin for a profile that it does not use, and the heap is broken from then on.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(plugin))
