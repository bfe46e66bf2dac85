"""Libraries that only some machines have."""

from __future__ import annotations

import importlib
from typing import Any

from moecompiler.errors import UserError


def import_library(module: str, title: str, extra: str) -> Any:
    """The module. ``extra`` of this package brings it. Raises: UserError where it is not installed, or does not load."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = f"pip install 'moecompiler[{extra}]'"
        if error.name == module:
            raise UserError(f"{title} is not installed: {install}") from None
        raise UserError(f"{title} does not load ({error}): {install}") from None
