"""A rank with a GPU and nothing else: memory, a stream, and its way to the others' GPUs; for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moecompiler.plugins.collectives.kept import Collectives, compile_collectives
from moecompiler.plugins.collectives.launch import USUAL, Sizes
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.device import Buffer, Device, Graph, Stream
from moecompiler.runtime.ipc import IpcCommunicator, connect
from moecompiler.weights import NUMPY_DTYPES


@dataclass(frozen=True)
class GpuRank:
    """``group`` are all ranks; ``data``: the kernels of collectives for messages of ``dtype``; ``how`` ranks see each other."""

    communicator: Communicator
    device: Device
    stream: Stream
    dtype: str
    data: bytes
    kernels: Collectives
    way: IpcCommunicator
    how: str

    @property
    def group(self) -> tuple[int, ...]:
        return tuple(range(self.communicator.world_size))

    def buffer(self, array: np.ndarray) -> Buffer:
        """A copy on the GPU."""
        buffer = Buffer(array.nbytes)
        self.stream.upload(buffer.pointer, array)
        self.stream.synchronize()
        return buffer

    def fetch(self, buffer: Buffer, shape: tuple[int, ...]) -> np.ndarray:
        """What is there when the stream has done all."""
        array = np.empty(shape, NUMPY_DTYPES[self.dtype])
        self.stream.download(array, buffer.pointer)
        self.stream.synchronize()
        self.way.check()
        return array

    def capture(self, work: Callable[[], None]) -> Graph:
        return self.stream.capture(work)


def join(communicator: Communicator, dtype: str, patience_s: float = 60.0, sizes: Sizes = USUAL) -> GpuRank:
    """Called by all ranks together: each on the GPU of its number, counted round where there are fewer.

    Raises: UserError where there is no GPU; RuntimeError where ranks cannot see one another's memory.
    """
    device = Device(communicator.rank)
    data = compile_collectives(dtype, device.info().sm, sizes)
    kernels = Collectives(data)
    way, how = connect(communicator, [tuple(range(communicator.world_size))], kernels, patience_s)
    if way is None:
        raise RuntimeError(f"the ranks cannot see one another's memory: {how}")
    return GpuRank(communicator, device, Stream(), dtype, data, kernels, way, how)
