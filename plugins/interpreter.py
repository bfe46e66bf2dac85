"""Processes in which Triton's interpreter runs kernels on the CPU.

Triton looks at its environment when it is imported, and makes of each function either a kernel to be compiled or one to be
interpreted; and what an interpreted kernel writes beside its tensors, it writes. So it has processes of its own.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait

from moecompiler.errors import UserError


def interpreter_pool(workers: int = 1) -> ProcessPoolExecutor:
    """Up to ``workers`` processes, started when they are needed, in which ``interpreted.run`` works; they end with this one.

    Raises: UserError where there is no Triton.
    """
    check_triton()
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)


def check_triton() -> None:
    """Raises: UserError where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "plugins on the CPU are run by Triton's interpreter, and Triton is not installed: pip install triton"
        )


def _start() -> None:
    """In a new process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TRITON_INTERPRET"] = "1"
    from moecompiler.plugins.interpreter_numbers import mend

    mend()


def _end_with_parent() -> None:
    """A process of the pool waits for work as long as there is one that could give it: itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
