"""A plan in memory with all that it needs to run, and the order in which that goes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import tensorrt as trt

from moecompiler.backends.tensorrt_build import process_log
from moecompiler.backends.tensorrt_messages import explain
from moecompiler.backends.tensorrt_record import Record
from moecompiler.errors import UserError
from moecompiler.runtime.device import Buffer, DeviceError, Graph, Stream
from moecompiler.runtime.weight_loading import load_weights
from moecompiler.weights import NUMPY_DTYPES, Shape

TENSOR_TYPES = {
    trt.DataType.FLOAT: NUMPY_DTYPES["float32"],
    trt.DataType.HALF: NUMPY_DTYPES["float16"],
    trt.DataType.BF16: NUMPY_DTYPES["bfloat16"],
    trt.DataType.INT64: NUMPY_DTYPES["int64"],
    trt.DataType.INT8: NUMPY_DTYPES["int8"],
    trt.DataType.UINT8: NUMPY_DTYPES["int8"],  # a cache's codes, the same bytes: see tensorrt_bytes
}
CACHE = "past_key_values."
_MAIN_INPUTS = ("input_ids", "hidden_states")


class Engine:
    """TensorRT's objects, the weights that are bound, and a stream. Contexts share one scratch memory: they never run at once.

    ``inputs`` are the names of what is neither a weight nor a cache, ``main`` the one of them that holds tokens or hidden states;
    ``output`` is what is not a cache. Nobody else keeps a context or a graph: ``release`` lets them go in the only order that
    TensorRT survives.

    Raises: UserError where the plan cannot be loaded, or the GPU has no room.
    """

    def __init__(self, directory: Path, stem: str, record: Record):
        self.contexts: dict[Any, Any] = {}
        self.graphs: dict[Any, Graph] = {}
        self.stream, self.log = Stream(), process_log()
        try:
            self.runtime: Any = trt.Runtime(self.log)
            self.plan: Any = self._load(directory / f"{record.shared or stem}.plan")
            self.weights = load_weights(directory / f"{stem}.safetensors", record.bound)
            self.scratch = Buffer(self.plan.device_memory_size_v2, "the engine's scratch memory")
        except BaseException:
            self.release()
            raise
        names = [self.plan.get_tensor_name(index) for index in range(self.plan.num_io_tensors)]
        modes = {name: self.plan.get_tensor_mode(name) for name in names}
        free = [name for name in names if modes[name] == trt.TensorIOMode.INPUT and name not in record.bound]
        self.caches = [name for name in free if name.startswith(CACHE)]
        self.inputs = [name for name in free if not name.startswith(CACHE)]
        self.main = next(name for name in self.inputs if name in _MAIN_INPUTS)
        outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        (self.output,) = [name for name in outputs if not name.startswith("present.")]

    def release(self) -> None:
        """Gives all back, what uses something before what it uses. The log stays."""
        with suppress(DeviceError):  # a GPU that has failed has nothing to wait for
            self.stream.synchronize()
        self.graphs.clear()
        self.contexts.clear()
        for name in ("plan", "runtime", "weights", "scratch"):
            self.__dict__.pop(name, None)

    def shape(self, name: str) -> Shape:
        """-1 where a dimension is free."""
        return tuple(self.plan.get_tensor_shape(name))

    def dtype(self, name: str) -> Any:
        """numpy's."""
        return TENSOR_TYPES[self.plan.get_tensor_dtype(name)]

    def make_context(self, key: Any, profile: int) -> Any:
        """A context of a profile, its weights bound; ``contexts[key]`` holds it.

        Raises: UserError where there is no room for it.
        """
        before = len(self.log.errors)
        context = self.plan.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise UserError(explain("cannot prepare to run the engine", self.log.errors[before:], ()))
        self.contexts[key] = context
        context.set_device_memory(self.scratch.pointer, self.scratch.nbytes)
        context.set_optimization_profile_async(profile, self.stream.handle)
        self.stream.synchronize()
        for name, buffer in self.weights.items():
            context.set_tensor_address(name, buffer.pointer)
        return context

    def enqueue(self, key: Any) -> None:
        """Puts a step of ``contexts[key]`` on the stream. Raises: RuntimeError where TensorRT refuses."""
        before = len(self.log.errors)
        if not self.contexts[key].execute_async_v3(self.stream.handle):
            raise RuntimeError(explain("cannot run the engine", self.log.errors[before:], ()))

    def _load(self, path: Path) -> Any:
        """Raises: UserError where the file is no plan of this TensorRT."""
        before = len(self.log.errors)
        plan = self.runtime.deserialize_cuda_engine(path.read_bytes())  # handed a mapped array, 10.6 crashes
        if plan is None:
            raise UserError(explain(f"cannot load {path}", self.log.errors[before:], ()))
        return plan


def filled(shape: Shape, tokens: tuple[int, int]) -> Shape:
    """A shape whose free dimensions are those of a step: the first axis is the batch, the second the sequence. Where an engine is
    for one sequence, TensorRT says that the batch is not free."""
    return tuple(tokens[axis] if size < 0 else size for axis, size in enumerate(shape))
