"""Collectives through the host: what lies on a GPU is fetched, exchanged by the rank's communicator, and put back.

It serves all ranks there are, on whatever hosts and GPUs; it waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.device import checked, driver
from moecompiler.weights import NUMPY_DTYPES

Exchange = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


class HostWay:
    """See ``DeviceCommunicator``."""

    name, capturable = "host", False

    def __init__(self, communicator: Communicator):
        self._communicator = communicator

    def takes(self, nbytes: int, group: tuple[int, ...]) -> bool:
        return True

    def all_reduce(self, x: int, y: int, elements: int, dtype: str, group: tuple[int, ...], stream: int) -> None:
        self._exchange(self._communicator.all_reduce, x, y, (elements,), dtype, group, stream)

    def all_gather(
        self, x: int, y: int, rows: int, columns: int, dtype: str, group: tuple[int, ...], stream: int
    ) -> None:
        self._exchange(self._communicator.all_gather, x, y, (rows, columns), dtype, group, stream)

    def leave(self) -> None:
        """Nothing is held."""

    def check(self) -> None:
        """A peer that is not there has been noticed by the communicator."""

    def close(self) -> None:
        """Nothing is held."""

    def _exchange(
        self,
        exchange: Exchange,
        x: int,
        y: int,
        shape: tuple[int, ...],
        dtype: str,
        group: tuple[int, ...],
        stream: int,
    ) -> None:
        cuda = driver()
        given = np.empty(shape, NUMPY_DTYPES[dtype])
        checked(cuda.cuMemcpyDtoHAsync(given.ctypes.data, x, given.nbytes, stream))
        checked(cuda.cuStreamSynchronize(stream))
        got = np.ascontiguousarray(exchange(given.astype(np.float32), group).astype(given.dtype))
        checked(cuda.cuMemcpyHtoDAsync(y, got.ctypes.data, got.nbytes, stream))
        checked(cuda.cuStreamSynchronize(stream))  # before ``got`` goes
