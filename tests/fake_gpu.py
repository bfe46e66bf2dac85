"""A GPU made of host memory, and a TensorRT whose engines are ONNX Runtime's: what a session does with both can be tested
anywhere. Freed memory is poisoned and then kept, so that whoever reads it is found out."""

from __future__ import annotations

import ctypes
import enum
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime

from moecompiler.backends.onnxruntime import open_session
from moecompiler.graph import DOMAIN

OK = (0,)


class FakeDriver:
    """The functions of ``cuda.bindings.driver`` that are called. What is put on a stream is done when somebody waits for it, in
    order; page-locked memory is read and written then, other memory of the host at once, as with the real one. A captured graph
    is the list of what was enqueued."""

    CUresult = SimpleNamespace(CUDA_ERROR_OUT_OF_MEMORY=2)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, memory: int = 1 << 30):
        self.blocks: dict[int, np.ndarray] = {}
        self.locked: set[int] = set()
        self.free = self.memory = memory
        self.pending: deque[Callable[[], None]] = deque()
        self.capturing: list[Callable[[], None]] | None = None
        self.launched = self.captured = 0
        self.destroyed: list[str] = []

    def cuMemAlloc(self, count: int) -> tuple[Any, ...]:
        if count > self.free:
            return _Failed(2), 0
        self.free -= count
        block = np.full(count, 0xFF, np.uint8)  # not a number, as uninitialized memory may be
        self.blocks[block.ctypes.data] = block
        return 0, block.ctypes.data

    def cuMemAllocHost(self, count: int) -> tuple[Any, ...]:
        status, pointer = self.cuMemAlloc(count)
        self.locked.add(pointer)
        return status, pointer

    def cuMemFree(self, pointer: int) -> tuple[int]:
        self._finish()
        self.free += len(self.blocks[pointer])
        self.blocks[pointer][:] = 0xFF
        self.destroyed.append("memory")
        return OK

    cuMemFreeHost = cuMemFree

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return 0, self.free, self.memory

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return 0, 1

    def cuCtxPushCurrent(self, context: int) -> tuple[int]:
        return OK

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        return 0, 1

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        return 0, 7

    def cuStreamDestroy(self, stream: int) -> tuple[int]:
        self.destroyed.append("stream")
        return OK

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        self._finish()
        return OK

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        return 0, {"passed": True}

    def cuEventDestroy(self, event: dict[str, bool]) -> tuple[int]:
        return OK

    def cuEventRecord(self, event: dict[str, bool], stream: int) -> tuple[int]:
        event["passed"] = False
        self.enqueue(lambda: event.update(passed=True))
        return OK

    def cuEventSynchronize(self, event: dict[str, bool]) -> tuple[int]:
        while not event["passed"]:
            self.pending.popleft()()
        return OK

    def cuMemcpyHtoDAsync(self, target: int, source: int, count: int, stream: int) -> tuple[int]:
        self._holding(target, count)
        if self._is_locked(source):
            self.enqueue(lambda: ctypes.memmove(target, source, count))
        else:
            data = ctypes.string_at(source, count)
            self.enqueue(lambda: ctypes.memmove(target, data, count))
        return OK

    def cuMemcpyDtoHAsync(self, target: int, source: int, count: int, stream: int) -> tuple[int]:
        self._holding(source, count)
        self.enqueue(lambda: ctypes.memmove(target, source, count))
        if not self._is_locked(target):
            self._finish()
        return OK

    def cuMemcpyDtoDAsync(self, target: int, source: int, count: int, stream: int) -> tuple[int]:
        self._holding(source, count)
        self._holding(target, count)
        self.enqueue(lambda: ctypes.memmove(target, source, count))
        return OK

    def cuMemsetD8Async(self, target: int, value: int, count: int, stream: int) -> tuple[int]:
        self._holding(target, count)
        self.enqueue(lambda: ctypes.memset(target, value, count))
        return OK

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.capturing = []
        return OK

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        graph, self.capturing = self.capturing, None
        self.captured += 1
        return 0, graph

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        return 0, graph

    def cuGraphDestroy(self, graph: Any) -> tuple[int]:
        return OK

    def cuGraphExecDestroy(self, graph: Any) -> tuple[int]:
        self.destroyed.append("graph")
        return OK

    def cuGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:
        self.launched += 1
        self.pending.extend(graph)
        return OK

    def enqueue(self, work: Callable[[], Any]) -> None:
        (self.pending if self.capturing is None else self.capturing).append(work)

    def _finish(self) -> None:
        while self.pending:
            self.pending.popleft()()

    def _is_locked(self, pointer: int) -> bool:
        return any(begin <= pointer < begin + len(self.blocks[begin]) for begin in self.locked)

    def array(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The GPU's memory as an array."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._holding(pointer, count)
        return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(pointer)).view(dtype).reshape(shape)

    def _holding(self, pointer: int, count: int) -> None:
        inside = any(begin <= pointer and pointer + count <= begin + len(block) for begin, block in self.blocks.items())
        assert inside, f"{count} bytes at {pointer} are nobody's"


class _Failed(int):
    name = "CUDA_ERROR_OUT_OF_MEMORY"


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64, INT8, UINT8 = range(6)


_TYPES = {
    "tensor(float)": DataType.FLOAT,
    "tensor(float16)": DataType.HALF,
    "tensor(int64)": DataType.INT64,
    "tensor(int8)": DataType.INT8,
    "tensor(uint8)": DataType.UINT8,
}
_NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.BF16: ml_dtypes.bfloat16,
    DataType.INT64: np.int64,
    DataType.INT8: np.int8,
    DataType.UINT8: np.uint8,
}


class FakeEngine:
    """The engine file beside the plan, in ONNX Runtime."""

    device_memory_size_v2 = 4096

    def __del__(self) -> None:
        self.driver.destroyed.append("engine")

    def __init__(self, session: onnxruntime.InferenceSession, driver: FakeDriver):
        self.session, self.driver = session, driver
        self.values = {value.name: value for value in (*session.get_inputs(), *session.get_outputs())}
        self.inputs = [value.name for value in session.get_inputs()]
        self.names = list(self.values)
        self.num_io_tensors = len(self.names)
        self.contexts: list[FakeContext] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.values[name].shape)

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self.values[name].type]

    def create_execution_context(self, strategy: str) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    """Runs on what lies at the addresses; what it writes, it writes when all is computed."""

    def __init__(self, engine: FakeEngine):
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def __del__(self) -> None:
        self.engine.driver.destroyed.append("context")

    def set_device_memory(self, pointer: int, count: int) -> None:
        assert count >= self.engine.device_memory_size_v2

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        step = self.shapes["position_ids"]
        return tuple(step[axis] if size < 0 else size for axis, size in enumerate(self.engine.get_tensor_shape(name)))

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.engine.driver.enqueue(lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine, array = self.engine, self.engine.driver.array
        dtypes = {name: _NUMPY[engine.get_tensor_dtype(name)] for name in engine.names}
        feeds = {name: array(addresses[name], shapes[name], dtypes[name]).copy() for name in engine.inputs}
        outputs = [name for name in engine.names if name not in engine.inputs]
        for name, value in zip(outputs, engine.session.run(outputs, feeds), strict=True):
            array(addresses[name], value.shape, dtypes[name])[...] = value


class FieldType(enum.Enum):
    INT8, INT32, FLOAT32 = np.int8, np.int32, np.float32


class Field:
    """Of the bindings that read arrays as they are."""

    def __init__(self, name: str, data: np.ndarray, kind: FieldType):
        assert data.dtype == kind.value
        self.name, self.data, self.type = name, data, kind


def fake_tensorrt(driver: FakeDriver, loaded: list[FakeEngine]) -> ModuleType:
    """A module for ``sys.modules["tensorrt"]``; engines that it loads are put into ``loaded``."""
    module: Any = ModuleType("tensorrt")
    module.__version__ = "10.6.0"

    class Runtime:
        def __init__(self, log: Any):
            self.log = log

        def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
            if not plan.startswith(b"/"):
                self.log.log(module.ILogger.ERROR, "[stdArchiveReader.cpp::38] magic tag does not match")
                return None
            loaded.append(FakeEngine(open_session(Path(plan.decode()), 1), driver))
            return loaded[-1]

    for name in ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneBuildV2", "IPluginV3OneRuntime"):
        setattr(module, name, type(name, (), {"__init__": lambda self: None}))
    module.IPluginCreatorV3One = type("IPluginCreatorV3One", (), {"__init__": lambda self: None})
    module.PluginField, module.PluginFieldCollection, module.PluginFieldType = Field, list, FieldType
    module.TensorFormat, module.DimsExprs = SimpleNamespace(LINEAR="linear"), list
    module.DimensionOperation = SimpleNamespace(PROD="*")
    creators: dict[tuple[str, str, str], Any] = {}
    module.get_plugin_registry = lambda: SimpleNamespace(
        get_creator=lambda name, version, space: creators.get((name, version, space)),
        register_creator=lambda creator, space: creators.update(
            {(creator.name, creator.plugin_version, space): creator}
        ),
        deregister_creator=lambda creator: creators.pop((creator.name, creator.plugin_version, DOMAIN), None),
    )
    module.ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "__init__": lambda self: None})
    module.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
    module.DataType, module.Runtime = DataType, Runtime
    module.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    return module
