"""What a rank puts into its collectives: the last thing that is its own before the ranks' parts become one."""

from __future__ import annotations

from typing import Any

import numpy as np

from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.device_communicator import Ways


class RecordingCommunicator:
    """A communicator that keeps what this rank last gave to be reduced."""

    def __init__(self, inner: Communicator):
        self._inner = inner
        self.rank, self.world_size = inner.rank, inner.world_size
        # what goes from GPU to GPU cannot be seen here: it records what goes through the host
        self.device: Ways | None = None
        self.last: np.ndarray | None = None

    def all_reduce(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        self.last = array.copy()
        return self._inner.all_reduce(array, group)

    def all_gather(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        return self._inner.all_gather(array, group)

    def send(self, array: np.ndarray, to: int) -> None:
        self._inner.send(array, to)

    def receive(self, source: int) -> np.ndarray:
        return self._inner.receive(source)

    def broadcast(self, value: Any, root: int) -> Any:
        return self._inner.broadcast(value, root)

    def gather_objects(self, value: Any) -> list[Any]:
        return self._inner.gather_objects(value)
