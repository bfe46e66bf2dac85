"""What goes into a step and comes out of it, save caches and weights: on the GPU, and page-locked on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moecompiler.backends.tensorrt_engine import Engine, filled
from moecompiler.runtime.device import Buffer, Event, HostBuffer
from moecompiler.weights import Shape


class Feeds:
    """Room for a step of ``tokens`` (sequences, tokens of each). Raises: UserError where there is none."""

    def __init__(self, engine: Engine, tokens: tuple[int, int]):
        self._engine = engine
        sizes = {
            name: self._nbytes(name, filled(engine.shape(name), tokens)) for name in (*engine.inputs, engine.output)
        }
        self.buffers = {name: Buffer(nbytes, "a step's values") for name, nbytes in sizes.items()}
        self._staging = {name: HostBuffer(nbytes) for name, nbytes in sizes.items()}
        self._uploaded = Event()

    def bind(self, context: Any, tokens: tuple[int, int]) -> None:
        """Shapes and addresses for a step."""
        for name in self._engine.inputs:
            context.set_input_shape(name, filled(self._engine.shape(name), tokens))
            context.set_tensor_address(name, self.buffers[name].pointer)
        context.set_tensor_address(self._engine.output, self.buffers[self._engine.output].pointer)

    def upload(self, arrays: Mapping[str, np.ndarray], rows: int) -> None:
        """Zeros in the rows that no array has. Inputs without an array come from elsewhere."""
        self._uploaded.wait()  # what is staged may still be on its way
        for name in [name for name in self._engine.inputs if name in arrays]:
            array = arrays[name]
            staged = self._staged(name, (rows, *array.shape[1:]))
            staged[: len(array)] = array
            staged[len(array) :] = 0
            self._engine.stream.upload(self.buffers[name].pointer, staged)
        self._uploaded.record(self._engine.stream)

    def nbytes(self, name: str, tokens: tuple[int, int]) -> int:
        """Of an input or the output in a step."""
        return self._nbytes(name, filled(self._engine.shape(name), tokens))

    def download(self, context: Any) -> np.ndarray:
        """The output of the step that the stream has been given last, waited for, in an array of its own."""
        name = self._engine.output
        staged = self._staged(name, tuple(context.get_tensor_shape(name)))
        self._engine.stream.download(staged, self.buffers[name].pointer)
        self._engine.stream.synchronize()
        return staged.copy()

    def clear(self) -> None:
        """Zeros in all inputs."""
        for name in self._engine.inputs:
            self._engine.stream.zero(self.buffers[name].pointer, self.buffers[name].nbytes)

    def _staged(self, name: str, shape: Shape) -> np.ndarray:
        nbytes = self._nbytes(name, shape)
        return self._staging[name].array[:nbytes].view(self._engine.dtype(name)).reshape(shape)

    def _nbytes(self, name: str, shape: Shape) -> int:
        return int(np.prod(shape, dtype=np.int64)) * self._engine.dtype(name).itemsize
