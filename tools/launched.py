"""One process's rank of a verb that runs under ``mpirun``."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import TypeVar

from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator, using_communicator
from moecompiler.runtime.mpi import launched_rank, world
from moecompiler.runtime.watchdog import PATIENCE_SECONDS, Watchdog, meeting
from moecompiler.tools.printing import USER_ERROR, complaint

T = TypeVar("T")


def run_launched(
    environment: Mapping[str, str], function: Callable[[Communicator], T], watchdog_s: float = PATIENCE_SECONDS
) -> T:
    """Runs this process's rank, alone where no launcher left its traces in ``environment``.

    An error of any rank, or a rank that gives no sign of life for ``watchdog_s`` seconds (0: not looked for), ends all of them;
    the cause is printed once. The exit status is then 2 for a UserError, else 1.

    Raises: as ``world``; where there is one rank, as ``function``.
    """
    with meeting(launched_rank(environment), watchdog_s):
        communicator = world(environment)
        watchdog = Watchdog(communicator, watchdog_s)
        watchdog.start()
    try:
        with using_communicator(communicator):
            result = function(communicator)
        watchdog.stop()
        return result
    except BaseException as error:
        if communicator.world_size == 1:
            raise
        if isinstance(error, UserError):
            watchdog.fail(complaint(str(error)), USER_ERROR)
        cause = complaint(f"{watchdog.named(communicator.rank)} failed: {error!r}; ending all ranks")
        watchdog.fail(traceback.format_exc() + cause, 1)
