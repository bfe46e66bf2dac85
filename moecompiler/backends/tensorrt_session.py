"""One rank's TensorRT engine, running: KV cache on the GPU, prefill by slices of the batch, decode as one CUDA graph.

What a plugin writes in place has one buffer; a cache that plain operators update has two, of which one is read and the other
written, in turn. A decode step of one batch bucket and one turn is one graph, captured when it runs for the second time (the
first loads what it needs), each with an execution context of its own: the contexts share one scratch memory, since they never
run at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.tensorrt_build import Log
from moecompiler.backends.tensorrt_messages import explain
from moecompiler.backends.tensorrt_profiles import DECODE, PREFILL, bucket_of
from moecompiler.backends.tensorrt_record import Record
from moecompiler.errors import UserError
from moecompiler.graph import COLLECTIVES
from moecompiler.runtime.device import Buffer, Device, Graph, HostBuffer, Stream
from moecompiler.runtime.weight_loading import load_weights
from moecompiler.weights import NUMPY_DTYPES, Shape

TENSOR_TYPES = {
    trt.DataType.FLOAT: NUMPY_DTYPES["float32"],
    trt.DataType.HALF: NUMPY_DTYPES["float16"],
    trt.DataType.BF16: NUMPY_DTYPES["bfloat16"],
    trt.DataType.INT64: NUMPY_DTYPES["int64"],
}
_MAIN_INPUTS = ("input_ids", "hidden_states")
_CACHE = "past_key_values."


@dataclass
class _Cache:
    """A layer's keys or values: rows of ``row_bytes``, in one buffer, or in two by turns."""

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


@dataclass
class _Decode:
    """A decode step of one bucket and turn; ``graph`` is None until it has run once."""

    context: Any
    graph: Graph | None = None
    ran: bool = False


@dataclass
class _Step:
    """What goes in and out of a step, on the GPU, as large as the largest step; and page-locked memory for it."""

    inputs: dict[str, Buffer] = field(default_factory=dict)
    staging: dict[str, HostBuffer] = field(default_factory=dict)


class TensorRTSession:
    """See ``runtime.session.StageSession``. ``device`` is current for the thread that uses the session.

    Raises: UserError where the plan cannot be loaded, or the GPU has no room.
    """

    def __init__(self, directory: Path, stem: str, record: Record, limits: EngineLimits, device: Device):
        self.max_batch_size, self.max_input_len = limits.max_batch_size, limits.max_input_len
        self.max_seq_len, self.vocab_size = limits.max_seq_len, limits.vocab_size
        self._prefill_rows, self._device, self._log = record.prefill_rows, device, Log()
        self._stream = Stream()
        self._runtime = trt.Runtime(self._log)
        self._engine = _load_plan(self._runtime, directory / f"{stem}.plan", self._log)
        self._weights = load_weights(directory / f"{stem}.safetensors", record.bound)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self._inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT and name not in record.bound]
        outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        (self._output,) = [name for name in outputs if not name.startswith("present.")]
        self._main = next(name for name in self._inputs if name in _MAIN_INPUTS)
        self._caches = [self._make_cache(name, record.aliases) for name in self._inputs if name.startswith(_CACHE)]
        self._small = [name for name in self._inputs if not name.startswith(_CACHE)]
        self._step = self._make_step()
        self._scratch = Buffer(self._engine.device_memory_size_v2, "the engine's scratch memory")
        self._prefill = self._make_context(PREFILL)
        self._decodes: dict[tuple[int, int], _Decode] = {}
        self._turn, self._batch = 0, 0
        self._capturable = not any(op in COLLECTIVES for op in record.plugins.values())  # they wait for other ranks

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Gives all back, what uses something before what it uses: TensorRT does not survive another order."""
        if stream := self.__dict__.get("_stream"):
            stream.synchronize()
        for decode in self.__dict__.get("_decodes", {}).values():
            decode.graph = None
        for name in (
            *("_decodes", "_prefill", "_engine", "_runtime", "_log"),
            *("_weights", "_caches", "_step", "_scratch", "_stream"),
        ):
            self.__dict__.pop(name, None)

    def start(self, batch: int) -> None:
        """Begins a batch with an empty KV cache."""
        self._turn, self._batch = 0, batch
        rows = bucket_of(batch, self.max_batch_size)
        for cache in self._caches:
            for buffer in cache.buffers:
                self._stream.zero(buffer.pointer, rows * cache.row_bytes)

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray) -> np.ndarray:
        """See ``StageSession.step``."""
        result = self.run(x, position_ids, last_token_ids)
        if self._output != "logits":
            return result.astype(np.float32)
        if result.ndim == 3:
            result = result[np.arange(len(result)), last_token_ids]
        return result.astype(np.float32)

    def run(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray) -> np.ndarray:
        """The engine's first output as it is, for all rows."""
        feeds = {self._main: x, "position_ids": position_ids, "last_token_ids": last_token_ids}
        if position_ids.shape[1] == 1:
            result = self._decode(feeds)
        else:
            rows = range(0, len(x), self._prefill_rows)
            parts = [
                self._prefill_slice({n: a[row : row + self._prefill_rows] for n, a in feeds.items()}, row)
                for row in rows
            ]
            result = np.concatenate(parts)
        self._turn += 1
        return result

    @property
    def input_types(self) -> dict[str, np.dtype]:
        """The dtype of every input that is not a weight."""
        return {name: TENSOR_TYPES[self._engine.get_tensor_dtype(name)] for name in self._inputs}

    def call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See ``runtime.session.CallableSession``."""
        self.start(len(feeds["position_ids"]))
        self.write_caches(feeds)
        missing = np.zeros(self._batch, np.int64)  # what only the last stage takes
        result = self.run(feeds[self._main], feeds["position_ids"], feeds.get("last_token_ids", missing))
        return {name: array.astype(np.float32) for name, array in ({self._output: result} | self.read_caches()).items()}

    def read_caches(self) -> dict[str, np.ndarray]:
        """The caches of the batch by the names of the graph's outputs, ``[batch, kv_heads, slots, head_dim]``."""
        arrays = {}
        for cache in self._caches:
            array = np.empty((self._batch, *cache.shape[1:]), cache.dtype)
            self._stream.download(array, cache.pointers(self._turn, 0)[0])
            arrays[cache.output] = array
        self._stream.synchronize()
        return arrays

    def write_caches(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Sets the caches of the batch, by the names of the graph's inputs."""
        for cache in self._caches:
            array = np.ascontiguousarray(arrays[cache.source], cache.dtype)
            self._stream.upload(cache.pointers(self._turn, 0)[0], array)
            self._stream.synchronize()

    def _prefill_slice(self, feeds: dict[str, np.ndarray], row: int) -> np.ndarray:
        """Runs some rows of the batch, whose caches begin at ``row``."""
        shape = feeds["position_ids"].shape
        self._bind(self._prefill, shape, row)
        self._upload(feeds, shape[0])
        self._enqueue(self._prefill)
        return self._download(self._prefill, shape[0])

    def _decode(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """One token of every sequence; rows that fill up the bucket write to cache rows that nobody reads."""
        rows = bucket_of(len(feeds["position_ids"]), self.max_batch_size)
        key = rows, self._turn % 2 if any(len(cache.buffers) > 1 for cache in self._caches) else 0
        decode = self._decodes.get(key)
        if decode is None:
            decode = self._decodes[key] = _Decode(self._make_context(DECODE))
            self._bind(decode.context, (rows, 1), 0)
        self._upload(feeds, rows)
        if decode.graph is None and decode.ran and self._capturable:
            decode.graph = self._stream.capture(lambda: self._enqueue(decode.context))
        if decode.graph is not None:
            decode.graph.launch(self._stream)
        else:
            self._enqueue(decode.context)
            decode.ran = True
        return self._download(decode.context, rows)[: len(feeds["position_ids"])]

    def _bind(self, context: Any, tokens: tuple[int, int], row: int) -> None:
        """Shapes and addresses of every tensor for a step of ``tokens`` (sequences, tokens of each)."""
        for name in self._small:
            shape = self._engine.get_tensor_shape(name)
            context.set_input_shape(name, _filled(shape, tokens))
            context.set_tensor_address(name, self._step.inputs[name].pointer)
        for name, buffer in self._weights.items():
            context.set_tensor_address(name, buffer.pointer)
        for cache in self._caches:
            read, written = cache.pointers(self._turn, row)
            context.set_input_shape(cache.source, (tokens[0], *cache.shape[1:]))
            context.set_tensor_address(cache.source, read)
            context.set_tensor_address(cache.output, written)
        context.set_tensor_address(self._output, self._step.inputs[self._output].pointer)

    def _upload(self, feeds: dict[str, np.ndarray], rows: int) -> None:
        for name in self._small:
            array, dtype = feeds[name], TENSOR_TYPES[self._engine.get_tensor_dtype(name)]
            shape = (rows, *array.shape[1:])
            count = int(np.prod(shape)) * dtype.itemsize
            staged = self._step.staging[name].array[:count].view(dtype).reshape(shape)
            staged[: len(array)] = array
            staged[len(array) :] = 0
            self._stream.upload(self._step.inputs[name].pointer, staged)

    def _download(self, context: Any, rows: int) -> np.ndarray:
        shape, dtype = (
            tuple(context.get_tensor_shape(self._output)),
            TENSOR_TYPES[self._engine.get_tensor_dtype(self._output)],
        )
        count = int(np.prod(shape)) * dtype.itemsize
        staged = self._step.staging[self._output].array[:count].view(dtype).reshape(shape)
        self._stream.download(staged, self._step.inputs[self._output].pointer)
        self._stream.synchronize()
        return staged.copy()

    def _enqueue(self, context: Any) -> None:
        before = len(self._log.errors)
        if not context.execute_async_v3(self._stream.handle):
            raise RuntimeError(explain("cannot run the engine", self._log.errors[before:], ()))

    def _make_context(self, profile: int) -> Any:
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise UserError(explain("cannot prepare to run the engine", self._log.errors, ()))
        context.set_device_memory(self._scratch.pointer, self._scratch.nbytes)
        context.set_optimization_profile_async(profile, self._stream.handle)
        self._stream.synchronize()
        return context

    def _make_cache(self, source: str, aliases: Mapping[str, str]) -> _Cache:
        output = source.replace(_CACHE, "present.")
        shape = (self.max_batch_size, *self._engine.get_tensor_shape(source)[1:])
        dtype = TENSOR_TYPES[self._engine.get_tensor_dtype(source)]
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        count = 1 if aliases.get(output) == source else 2
        return _Cache(source, output, shape, dtype, [Buffer(nbytes, "the KV cache") for _ in range(count)])

    def _make_step(self) -> _Step:
        """Room for the largest prefill slice and the largest decode step."""
        step = _Step()
        sizes = (self._prefill_rows, self.max_input_len), (self.max_batch_size, 1)
        for name in (*self._small, self._output):
            shape = tuple(self._engine.get_tensor_shape(name))
            itemsize = TENSOR_TYPES[self._engine.get_tensor_dtype(name)].itemsize
            nbytes = max(int(np.prod(_filled(shape, each), dtype=np.int64)) for each in sizes) * itemsize
            step.inputs[name], step.staging[name] = Buffer(nbytes), HostBuffer(nbytes)
        return step


def _filled(shape: Shape, tokens: tuple[int, int]) -> Shape:
    """A shape whose free dimensions, ``batch`` and then ``sequence``, are those of a step."""
    free = iter(tokens)
    return tuple(next(free) if size < 0 else size for size in shape)


def _load_plan(runtime: Any, path: Path, log: Log) -> Any:
    """Raises: UserError where the file is no plan of this TensorRT."""
    engine = runtime.deserialize_cuda_engine(path.read_bytes())  # handed a mapped array, 10.6 crashes
    if engine is None:
        raise UserError(explain(f"cannot load {path}", log.errors, ()))
    return engine
