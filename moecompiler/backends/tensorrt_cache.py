"""The KV cache on the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moecompiler.backends.tensorrt_engine import CACHE, Engine
from moecompiler.runtime.device import Buffer
from moecompiler.weights import Shape


@dataclass
class Cache:
    """A layer's keys or values: rows of ``row_bytes``, in one buffer that a plugin writes in place, or in two, of which one is
    read and the other written, in turn."""

    source: str
    output: str
    shape: Shape
    dtype: np.dtype
    buffers: list[Buffer]

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def pointers(self, turn: int, row: int) -> tuple[int, int]:
        """Where it is read and where it is written from ``row`` on."""
        read, written = self.buffers[turn % len(self.buffers)], self.buffers[(turn + 1) % len(self.buffers)]
        return read.pointer + row * self.row_bytes, written.pointer + row * self.row_bytes


class Caches:
    """Those of all layers. Raises: UserError where the GPU has no room."""

    def __init__(self, engine: Engine, sequences: int, aliases: Mapping[str, str]):
        self._engine = engine
        self._caches = [self._make(name, sequences, aliases) for name in engine.caches]
        self._steps: dict[int, int] = {}  # of each part of the batch, by its first sequence
        self._turns = max((len(cache.buffers) for cache in self._caches), default=1)

    def turn(self, part: int) -> int:
        """What decides which buffers a step reads and writes, of the part of the batch that begins with sequence ``part``."""
        return self._steps.get(part, 0) % self._turns

    def start(self, rows: int) -> None:
        """Empties the caches of the first ``rows`` sequences."""
        self._steps.clear()
        for cache in self._caches:
            for buffer in cache.buffers:
                self._engine.stream.zero(buffer.pointer, rows * cache.row_bytes)

    def advance(self, part: int) -> None:
        """What has been written is read next."""
        self._steps[part] = self._steps.get(part, 0) + 1

    def bind(self, context: Any, rows: int, part: int, row: int = 0) -> None:
        """A step of ``rows`` sequences, the first of which is number ``row`` of its part of the batch."""
        for cache in self._caches:
            read, written = cache.pointers(self.turn(part), part + row)
            context.set_input_shape(cache.source, (rows, *cache.shape[1:]))
            context.set_tensor_address(cache.source, read)
            context.set_tensor_address(cache.output, written)

    def read(self, batch: int) -> dict[str, np.ndarray]:
        """Of an undivided batch, by the names of the graph's outputs: ``[batch, kv_heads, slots, head_dim]``."""
        arrays = {}
        for cache in self._caches:
            array = np.empty((batch, *cache.shape[1:]), cache.dtype)
            self._engine.stream.download(array, cache.pointers(self.turn(0), 0)[0])
            arrays[cache.output] = array
        self._engine.stream.synchronize()
        return arrays

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Of an undivided batch, by the names of the graph's inputs."""
        for cache in self._caches:
            array = np.ascontiguousarray(arrays[cache.source], cache.dtype)
            self._engine.stream.upload(cache.pointers(self.turn(0), 0)[0], array)
            self._engine.stream.synchronize()

    def _make(self, source: str, sequences: int, aliases: Mapping[str, str]) -> Cache:
        output = source.replace(CACHE, "present.")
        shape, dtype = (sequences, *self._engine.shape(source)[1:]), self._engine.dtype(source)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        count = 1 if aliases.get(output) == source else 2
        return Cache(source, output, shape, dtype, [Buffer(nbytes, "the KV cache") for _ in range(count)])
