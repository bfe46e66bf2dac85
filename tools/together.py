"""What every rank does by itself, and fails at together."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TypeVar

from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator

T = TypeVar("T")


def together(communicator: Communicator, function: Callable[[], T]) -> T:
    """Calls ``function`` on every rank. Raises: UserError on all where one raises it: the same, of the first rank that failed."""
    result, error = None, None
    try:
        result = function()
    except UserError as raised:
        error = platform.node(), str(raised)
    for rank, failed in enumerate(communicator.gather_objects(error)):
        if failed is not None:
            host, text = failed
            raise UserError(text if communicator.world_size == 1 else f"rank {rank} on {host}: {text}")
    return result  # type: ignore[return-value]
