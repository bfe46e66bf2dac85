"""One task per rank: in this process, or in several at once. The first that fails ends the others."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from moecompiler.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from rich.console import Console

_GRACE_SECONDS = 2.0  # between asking a process to end and killing it
_QUIET_SECONDS = 1.0  # what is faster shows no progress
_REPORT_SECONDS = 0.1  # between two progress messages of a worker
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Item = TypeVar("Item", int, str)
Result = TypeVar("Result")
Show = Callable[[Any, float], None]  # (item, what is done of it, 0 to 1)


class ProgressFn(Protocol):
    """What a task reports with: ``progress(0.25)``, or ``progress(bytes_done, bytes_in_all)``."""

    def __call__(self, done: float, total: float = 1.0, /) -> None: ...


def run_ranks(
    task: Callable[[Item, ProgressFn], Result],
    items: Sequence[Item],
    workers: int,
    describe: str,
    *,
    on_result: Callable[[Item, Result], None] | None = None,
    threads_per_worker: int | None = None,
    console: Console | None = None,
    placed: Callable[[int], Callable[[Item, ProgressFn], Result]] | None = None,
) -> dict[Item, Result]:
    """Runs ``task(item, progress)`` for each of ``items`` (ranks, or labels) and returns the results in their order.

    With one worker or one item it all happens here. Otherwise each item gets a fresh process, ``workers`` at a time; task,
    results and errors must be picklable, and each process gets ``threads_per_worker`` threads for mathematics (the CPUs
    shared out). ``placed(place)`` is the task of the worker in that place, 0 to ``workers - 1``: of those that run at one
    time each has another. ``on_result`` is called here, as each result arrives. What takes over a second shows a bar per item,
    named by ``describe``, on ``console`` (stderr), if that is a terminal.

    Raises: the first error of a task, after the other processes have ended: a UserError with the item named, another
    error with the worker's traceback as a note. UserError where a worker was killed. What ``on_result`` raises.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: give 1 or more")
    if len(set(items)) != len(items):
        raise ValueError(f"items are not distinct: {items}")
    results: dict[Item, Result] = {}

    def finish(item: Item, result: Result) -> None:
        if on_result is not None:
            on_result(item, result)
        results[item] = result

    workers = min(workers, len(items))
    with _bars(describe, items, console) as show:
        if workers <= 1:
            _run_here(placed(0) if placed else task, items, show, finish)
        else:
            threads = threads_per_worker or max(1, _usable_cpus() // workers)
            tasks = [pickle.dumps(placed(place) if placed else task) for place in range(workers)]
            _run_spawned(tasks, items, threads, show, finish)
    return {item: results[item] for item in items}


def name_of(item: int | str) -> str:
    return item if isinstance(item, str) else f"rank {item}"


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_here(task: Callable[..., Any], items: Sequence[Any], show: Show, finish: Callable[..., None]) -> None:
    for item in items:

        def progress(done: float, total: float = 1.0, /, item: int | str = item) -> None:
            show(item, done / total if total else 1.0)

        progress(0.0)
        try:
            result = task(item, progress)
        except UserError as error:
            raise UserError(f"{name_of(item)}: {error}") from error
        progress(1.0)
        finish(item, result)


@dataclass
class _Worker:
    """A process and the reading end of what it sends: ("progress", fraction), then ("result", …) or ("error", …)."""

    item: Any
    place: int
    process: BaseProcess
    connection: Connection
    settled: bool = False  # its result has come

    @property
    def events(self) -> list[Any]:
        # Once the result is here only the end of the process is news; the closed pipe would be "ready" without end.
        return [self.process.sentinel] if self.connection.closed else [self.process.sentinel, self.connection]


def _run_spawned(
    tasks: Sequence[bytes], items: Sequence[Any], threads: int, show: Show, finish: Callable[..., None]
) -> None:
    """``tasks``: of each place."""
    resource_tracker.ensure_running()  # starting it later would let interrupts through to the first worker
    waiting, running = deque(items), list[_Worker]()
    try:
        while waiting or running:
            free = sorted(set(range(len(tasks))) - {worker.place for worker in running})
            for place in free[: len(waiting)]:
                running.append(_start(tasks[place], waiting.popleft(), place, threads))
            ready = set(wait([event for worker in running for event in worker.events]))
            for worker in list(running):
                if ready.intersection(worker.events):
                    # Asked before reading: an ended process has sent all it ever will.
                    ended = worker.process.sentinel in ready
                    _receive(worker, show, finish)
                    if ended:
                        running.remove(worker)
                        _check_end(worker)
    finally:
        _end(running)


def _start(task: bytes, item: int | str, place: int, threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(task, item, threads, writing), name=name_of(item), daemon=True)
    with _interrupts_blocked():
        process.start()
    writing.close()
    return _Worker(item, place, process, reading)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal. Workers inherit the block, so this process alone decides; here the
    signal arrives when the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(worker: _Worker, show: Show, finish: Callable[..., None]) -> None:
    for kind, content in _messages(worker.connection):
        if kind == "progress":
            show(worker.item, content)
        elif kind == "result":
            worker.settled = True
            show(worker.item, 1.0)
            finish(worker.item, content)
        elif isinstance(content, UserError):
            raise UserError(f"{name_of(worker.item)}: {content}") from content
        else:
            raise content


def _messages(connection: Connection) -> Iterator[tuple[str, Any]]:
    """What lies ready in the pipe; closes it when the other end is closed, if need be in the middle of a message."""
    while not connection.closed:
        try:
            if not connection.poll():
                return
            message = connection.recv()
        except (EOFError, OSError):
            connection.close()
            return
        yield message


def _check_end(worker: _Worker) -> None:
    worker.process.join()
    worker.connection.close()
    if worker.settled:
        return
    code = worker.process.exitcode
    if code is not None and code < 0:
        guess = " (out of memory?)" if -code == signal.SIGKILL else f" ({signal.strsignal(-code)})"
        raise UserError(f"{name_of(worker.item)}: its process was killed by signal {-code}{guess}")
    raise RuntimeError(f"{name_of(worker.item)}: its process ended with status {code} and without a result")


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()
        worker.connection.close()


def _work(task: bytes, item: int | str, threads: int, connection: Connection) -> None:
    """A worker's whole life. The task comes pickled, so that what it imports sees the thread limits."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for variable in _THREAD_VARIABLES:
        os.environ.setdefault(variable, str(threads))
    last = float("-inf")

    def progress(done: float, total: float = 1.0, /) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS:
            last = now
            connection.send(("progress", done / total if total else 1.0))

    try:
        progress(0.0)
        connection.send(("result", pickle.loads(task)(item, progress)))
    except BaseException as error:
        connection.send(("error", _portable(error, item)))


def _end_with_parent() -> None:
    """Ends this process when the parent is gone, even by kill -9: nobody would take the result, and the lock on the output
    directory is free."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: BaseException, item: int | str) -> BaseException:
    """The error with its traceback as a note, or, where it does not survive pickling or would end the parent, a
    RuntimeError that says the same."""
    if isinstance(error, UserError):
        return UserError(str(error))
    note = f"in the worker of {name_of(item)}:\n" + "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, Exception):
        with suppress(Exception):
            copy = pickle.loads(pickle.dumps(error))
            if type(copy) is type(error) and str(copy) == str(error):
                copy.add_note(note)
                return copy
    replacement = RuntimeError("".join(traceback.format_exception_only(error)).strip())
    replacement.add_note(note)
    return replacement


@contextmanager
def _bars(describe: str, items: Sequence[int | str], console: Console | None) -> Iterator[Show]:
    """A progress bar for each item, gone at the end, drawn only where it takes over a second on a terminal."""
    if console is None and not sys.stderr.isatty():
        yield lambda item, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    # stdout may be a pipe while stderr is a terminal: what is printed there must not end up between the bars.
    bars = Progress(*columns, console=console or Console(stderr=True), transient=True, redirect_stdout=False)
    tasks = {
        item: bars.add_task(f"{describe} {name_of(item)}", total=1.0, start=False, visible=False) for item in items
    }

    def show(item: int | str, fraction: float) -> None:
        if not bars.tasks[tasks[item]].started:
            bars.start_task(tasks[item])
        bars.update(tasks[item], completed=fraction, visible=True)

    if not bars.console.is_interactive:
        yield lambda item, fraction: None
        return
    timer = threading.Timer(_QUIET_SECONDS, bars.start)
    timer.daemon = True
    timer.start()
    try:
        yield show
    finally:
        timer.cancel()
        timer.join()
        bars.stop()
