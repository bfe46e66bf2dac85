"""Processes in which Triton's interpreter runs kernels on the CPU.

Triton looks at its environment when it is imported, and makes of each function either a kernel to be compiled or one to be
interpreted; and what an interpreted kernel writes beside its tensors, it writes. So it has processes of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

import numpy as np
from threadpoolctl import threadpool_limits

from moecompiler.backends.interpreted_node import InterpretedNode
from moecompiler.errors import UserError


def interpreter_pool(workers: int = 1) -> ProcessPoolExecutor:
    """Up to ``workers`` processes, started when they are needed, in which ``interpreted.run`` works; they end with this one.

    Raises: UserError where there is no Triton.
    """
    check_triton()
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)


def interpret(node: str, file: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """See ``base.PluginLibrary.interpret``. Processes are started when they are needed, one for each thread that interprets at
    the same time, and stay.

    Raises: UserError where there is no Triton, or a kernel fails.
    """
    pool = shared_pool()
    try:
        return pool.submit(_run_node, node, file, list(arrays)).result()
    except UserError:
        raise
    except BrokenProcessPool:
        if shared_pool() is pool:  # another thread may have come first
            shared_pool.cache_clear()
        raise UserError(_failed(node, "the process died: it read or wrote beside its tensors, or was killed")) from None
    except Exception as error:
        raise UserError(_failed(node, str(error))) from None


def _failed(node: str, why: str) -> str:
    about = InterpretedNode.from_json(node)
    return f"{about.name}: interpreting the kernels of plugin {about.op} (tactic {about.tactic}) failed: {why}"


@functools.cache
def shared_pool() -> ProcessPoolExecutor:
    """The processes of ``interpret``."""
    return interpreter_pool(os.cpu_count() or 1)


def _run_node(node: str, file: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
    from moecompiler.plugins.interpreted_node import run_node

    try:
        return run_node(node, file, arrays)
    except UserError:
        raise
    except Exception as error:  # the interpreter's, one within another for each function that a kernel called
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise RuntimeError(f"{type(cause).__name__}: {cause}") from None


def check_triton() -> None:
    """Raises: UserError where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "plugins on the CPU are run by Triton's interpreter, and Triton is not installed: pip install triton"
        )


def _start() -> None:
    """In a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TRITON_INTERPRET"] = "1"
    from moecompiler.plugins.interpreter_numbers import mend

    mend()
    # a tile's product is small: threads would wait for one another longer than they multiply
    threadpool_limits(1)


def _end_with_parent() -> None:
    """A process of the pool waits for work as long as there is one that could give it: itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
