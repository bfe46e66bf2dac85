"""Ends a run under MPI as a whole, and soon, when one of its ranks fails, and says why once.

Each rank has a thread that gives signs of life to rank 0, and hears rank 0's, over a communicator of its own. Whoever finds
a rank lost, and rank 0 where a rank says that it fails, prints the cause and ends all by ``MPI_Abort``. A rank that is killed
is noticed by ``mpirun`` before.

The thread needs Python's lock for a moment: the patience has to be longer than any call that keeps it, of which loading an
engine has none.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.mpi import MpiCommunicator, abort
from moecompiler.runtime.vital_signs import LostRank, VitalSigns, work_done

PATIENCE_SECONDS = 7.0  # so that every process is gone 10 s after the last sign of one
_SIGN, _FAILURE = 1, 2  # message tags
_GRACE_SECONDS = 2.0  # in which an abort, or what was asked of rank 0, has to happen
_MEETING_SECONDS = 30.0  # Python starts, from a slow disk, sooner on one node than on another
_TURN_SECONDS, _MOST_TURNS = 0.75, 4  # ranks that find rank 0 lost speak one after the other, so that only one does


class Watchdog:
    """One rank's watch over its peers, from ``start`` to ``stop``. ``seconds``: its patience, 0 for signs not looked for."""

    def __init__(self, communicator: Communicator, seconds: float):
        self._communicator, self._seconds = communicator, seconds
        self.rank, self.host = communicator.rank, platform.node()
        self._hosts = [self.host]
        self._comm: Any = None
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Called by all ranks together. Without MPI, or where MPI takes calls from one thread alone, there is no watch."""
        if isinstance(self._communicator, MpiCommunicator) and self._communicator.world_size > 1:
            self._hosts = self._communicator.gather_objects(self.host)
            self._comm = self._communicator.second_channel()
            if self._comm is not None:
                self._thread.start()

    def stop(self) -> None:
        """Called by all ranks when they have done their work; returns when all have."""
        self._communicator.gather_objects(None)
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
            self._communicator.gather_objects(None)
            self._take(VitalSigns((), 0, 0), 0)  # MPI is to be left with no message on its way

    def fail(self, cause: str, status: int) -> NoReturn:
        """Ends all ranks. ``cause`` (lines for stderr) is printed unless another rank's already is."""
        if self.rank != 0 and self._thread.is_alive():
            sent = self._comm.isend((cause, status), dest=0, tag=_FAILURE)
            time.sleep(_GRACE_SECONDS)  # rank 0 prints it, and ends this process
            sent.Test()
        self._end(cause, status)

    def named(self, rank: int) -> str:
        """``rank 3 on node7``."""
        return f"rank {rank} on {self._hosts[rank]}"

    def _end(self, cause: str, status: int) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * _GRACE_SECONDS)
            os._exit(status)
        print(cause, file=sys.stderr, flush=True)
        timer = threading.Timer(_GRACE_SECONDS, os._exit, (status,))  # should MPI itself hang
        timer.daemon = True
        timer.start()
        abort(self._communicator, status)

    def _watch(self) -> None:
        peers = tuple(range(1, self._communicator.world_size)) if self.rank == 0 else (0,)
        interval = min(1.0, self._seconds / 10) if self._seconds else 0.2
        signs, last = VitalSigns(peers, self._seconds, time.monotonic()), time.monotonic()
        own = VitalSigns((self.rank,), self._seconds, last)  # rank 0 hears nobody of itself
        pending: list[Any] = []
        while not self._stopped.wait(interval):
            now = time.monotonic()
            if now - last > max(1.0, self._seconds / 2):
                signs.forgive(now)
                own.forgive(now)
            last = now
            own.hear(self.rank, work_done(), now)
            pending = [each for each in pending if not each.Test()]
            if len(pending) <= 4 * len(peers):  # a peer that takes nothing any more is not to fill memory
                pending += [self._comm.isend(work_done(), dest=peer, tag=_SIGN) for peer in peers]
            self._take(signs, now)
            if self._seconds:
                self._judge(signs, own, now)

    def _take(self, signs: VitalSigns, now: float) -> None:
        """Takes all that has come in."""
        status = _status()
        while self._comm.iprobe(tag=_any_tag(), status=status):
            source, tag = status.Get_source(), status.Get_tag()
            message = self._comm.recv(source=source, tag=tag)
            if tag == _FAILURE:
                self._end(*message)
            signs.hear(source, message, now)

    def _judge(self, signs: VitalSigns, own: VitalSigns, now: float) -> None:
        turn = min(self.rank - 1, _MOST_TURNS) * _TURN_SECONDS if self.rank else 0.0
        lost: LostRank | None = signs.lost(now, self._seconds + turn)
        if self.rank == 0 and lost is None:
            lost = own.lost(now)
        if lost is not None:
            more = f"; ending all ranks (--watchdog_s {self._seconds:g})"
            self._end(f"moecompiler: error: {self.named(lost.rank)} {lost.how}{more}", 1)


@contextmanager
def meeting(rank: int | None, seconds: float) -> Iterator[None]:
    """Ends this process, with a stack trace, where MPI's start inside the block takes so long that a rank must have been lost
    on the way. ``rank``: as the launcher says; None: there is nobody to meet. ``seconds``: the watchdog's patience; 0: waits.

    By ``faulthandler``, which does not need Python's lock: mpi4py keeps it while MPI starts.
    """
    if rank is None or not seconds:
        yield
        return
    faulthandler.dump_traceback_later(max(_MEETING_SECONDS, seconds) + rank % _MOST_TURNS, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _status() -> Any:
    from mpi4py import MPI

    return MPI.Status()


def _any_tag() -> int:
    from mpi4py import MPI

    return int(MPI.ANY_TAG)
