"""An NCCL made of threads and host memory: ranks meet by unique ids, calls wait for their peers and act at once."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from moecompiler.runtime.nccl_library import DTYPES, UniqueId

_NUMPY = {
    DTYPES["bytes"]: np.dtype(np.uint8),
    DTYPES["float16"]: np.dtype(np.float16),
    DTYPES["float32"]: np.dtype(np.float32),
    DTYPES["bfloat16"]: np.dtype(ml_dtypes.bfloat16),
}
_PATIENCE_SECONDS = 10


class _Clique:
    """The ranks of one unique id; what each has posted in the current call."""

    def __init__(self, size: int):
        self.size = size
        self.posted: dict[int, np.ndarray] = {}
        self.met = threading.Barrier(size, timeout=_PATIENCE_SECONDS)
        self.letters: dict[tuple[int, int], list[np.ndarray]] = {}
        self.changed = threading.Condition()


class FakeNccl:
    """The functions of ``libnccl`` that are called, for ranks that are threads. ``fails``: a function by name, and its status."""

    def __init__(self, fails: dict[str, int] | None = None):
        self.fails = fails or {}
        self.cliques: dict[bytes, _Clique] = {}
        self.members: dict[int, tuple[_Clique, int]] = {}
        self.aborted: list[int] = []
        self.broken = 0
        self._numbers, self._lock = itertools.count(1), threading.Lock()

    def ncclGetVersion(self, number: Any) -> int:
        number._obj.value = 22907
        return 0

    def ncclGetErrorString(self, status: int) -> bytes:
        return {2: b"unhandled system error", 6: b"remote process exited or there was a network error"}[status]

    def ncclGetLastError(self, handle: int | None) -> bytes:
        return b"connect to 10.0.0.7 refused\n"

    def ncclGetUniqueId(self, unique: Any) -> int:
        with self._lock:
            unique._obj.internal = f"unique {next(self._numbers)}".encode()
        return self.fails.get("ncclGetUniqueId", 0)

    def ncclCommInitRank(self, handle: Any, size: int, unique: UniqueId, place: int) -> int:
        with self._lock:
            clique = self.cliques.setdefault(bytes(unique), _Clique(size))
            handle._obj.value = next(self._numbers)
            self.members[handle._obj.value] = clique, place
        assert clique.size == size
        clique.met.wait()
        return self.fails.get("ncclCommInitRank", 0) if place == size - 1 else 0

    def ncclCommAbort(self, handle: int) -> int:
        self.aborted.append(handle)
        return 0

    def ncclCommGetAsyncError(self, handle: int, status: Any) -> int:
        status._obj.value = self.broken
        return 0

    def ncclAllReduce(self, x: int, y: int, count: int, dtype: int, op: int, handle: int, stream: int) -> int:
        return self._collective(x, y, count, dtype, handle, "ncclAllReduce", lambda parts: sum(parts[1:], parts[0]))

    def ncclAllGather(self, x: int, y: int, count: int, dtype: int, handle: int, stream: int) -> int:
        return self._collective(x, y, count, dtype, handle, "ncclAllGather", np.concatenate)

    def ncclSend(self, x: int, count: int, dtype: int, peer: int, handle: int, stream: int) -> int:
        clique, place = self.members[handle]
        with clique.changed:
            clique.letters.setdefault((place, peer), []).append(_view(x, count, dtype).copy())
            clique.changed.notify_all()
        return 0

    def ncclRecv(self, y: int, count: int, dtype: int, peer: int, handle: int, stream: int) -> int:
        clique, place = self.members[handle]
        with clique.changed:
            assert clique.changed.wait_for(lambda: clique.letters.get((peer, place)), timeout=_PATIENCE_SECONDS)
            _view(y, count, dtype)[:] = clique.letters[peer, place].pop(0)
        return 0

    def _collective(
        self, x: int, y: int, count: int, dtype: int, handle: int, name: str, join: Callable[[list[np.ndarray]], Any]
    ) -> int:
        if status := self.fails.get(name, 0):
            return status
        clique, place = self.members[handle]
        clique.posted[place] = _view(x, count, dtype).copy()
        clique.met.wait()
        result = join([clique.posted[each] for each in range(clique.size)])
        clique.met.wait()  # before anybody posts again
        _view(y, len(result), dtype)[:] = result
        return 0


def _view(pointer: int, count: int, dtype: int) -> np.ndarray:
    kind = _NUMPY[dtype]
    return np.ctypeslib.as_array((ctypes.c_uint8 * (count * kind.itemsize)).from_address(pointer)).view(kind)
