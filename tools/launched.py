"""One process's rank of a verb that runs under ``mpirun``."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator, using_communicator
from moecompiler.runtime.mpi import abort

T = TypeVar("T")


def run_launched(communicator: Communicator, function: Callable[[], T]) -> T:
    """Runs this process's rank. An error that all ranks see ends each of them with its own line; any other ends them all."""
    try:
        with using_communicator(communicator):
            return function()
    except UserError:
        raise
    except BaseException as error:
        if communicator.world_size == 1:
            raise
        traceback.print_exc()
        print(f"moecompiler: rank {communicator.rank} failed ({error!r}); ending all ranks", file=sys.stderr)
        abort(communicator, 1)
