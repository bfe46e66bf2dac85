"""A GPU as sessions need it: memory, a stream, graphs of launches; over the CUDA driver's own interface (cuda-bindings).

The driver is asked directly, without torch: a rank that runs an engine starts without it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from moecompiler.errors import UserError


class DeviceError(RuntimeError):
    """The driver refused; the text is its own."""


@cache
def driver() -> Any:
    """cuda-bindings' driver module, initialized. Raises: UserError where there is no GPU, or no cuda-bindings."""
    try:
        from cuda.bindings import driver as cuda
    except ImportError:
        raise UserError("cuda-bindings is not installed: pip install 'moecompiler[tensorrt]'") from None
    try:
        (status,) = cuda.cuInit(0)
    except RuntimeError:  # libcuda itself is not there
        raise UserError("no CUDA GPU can be used here: there is no NVIDIA driver") from None
    if int(status):
        raise UserError(f"no CUDA GPU can be used here ({status.name}): see what nvidia-smi says")
    return cuda


def checked(result: tuple[Any, ...]) -> Any:
    """What a driver function gave: nothing, a value or several. Raises: DeviceError where it failed."""
    status, *values = result
    if int(status):
        raise DeviceError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values) or None


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU; ``sm``: its compute capability as one number, 90 for 9.0; ``driver``: the CUDA version the driver speaks."""

    name: str
    sm: int
    driver: str
    memory: int  # bytes


class Device:
    """GPU number ``ordinal``, counted round where there are fewer, made current for the calling thread.

    Raises: UserError where there is no GPU.
    """

    def __init__(self, ordinal: int = 0):
        cuda = driver()
        count = checked(cuda.cuDeviceGetCount())
        if count == 0:
            raise UserError("no CUDA GPU can be used here: see what nvidia-smi says")
        self._device = checked(cuda.cuDeviceGet(ordinal % count))
        self._context = checked(cuda.cuDevicePrimaryCtxRetain(self._device))
        self.make_current()

    def make_current(self) -> None:
        """The context of a GPU belongs to a thread; whoever calls from another thread must call this first."""
        checked(driver().cuCtxSetCurrent(self._context))

    def info(self) -> DeviceInfo:
        cuda = driver()
        attribute = cuda.CUdevice_attribute
        major, minor = (
            checked(cuda.cuDeviceGetAttribute(each, self._device))
            for each in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = checked(cuda.cuDeviceGetName(128, self._device)).split(b"\0")[0].decode()
        version = checked(cuda.cuDriverGetVersion())
        total = checked(cuda.cuDeviceTotalMem(self._device))
        return DeviceInfo(name, 10 * major + minor, f"{version // 1000}.{version % 1000 // 10}", int(total))


def at_the_end(owner: object, release: Callable[..., Any], resource: Any) -> Any:
    """Gives ``resource`` back when ``owner`` goes, on whatever thread that is: it may have no current context, or another. Where
    the interpreter ends first, what was made last goes first. Called, the result does it at once."""
    cuda = driver()
    context = checked(cuda.cuCtxGetCurrent())

    def give_back() -> None:
        cuda.cuCtxPushCurrent(context)
        release(resource)
        cuda.cuCtxPopCurrent()

    return weakref.finalize(owner, give_back)


class Buffer:
    """``nbytes`` of the GPU's memory at ``pointer``, given back when nobody holds it any more.

    Raises: UserError where the GPU has no room.
    """

    def __init__(self, nbytes: int, what: str = "a buffer"):
        cuda = driver()
        status, pointer = cuda.cuMemAlloc(max(nbytes, 1))
        if int(status) == int(cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY):
            free, total = checked(cuda.cuMemGetInfo())
            raise UserError(
                f"the GPU has no room for {what}: {nbytes / 1e9:.2f} GB wanted, {free / 1e9:.2f} of {total / 1e9:.2f} GB free;"
                " use more ranks, or build with a smaller --max_batch_size or --max_seq_len"
            )
        self.pointer, self.nbytes = int(checked((status, pointer))), nbytes
        self._free = at_the_end(self, cuda.cuMemFree, pointer)


class HostBuffer:
    """``array``: bytes of page-locked host memory, which copies to and from the GPU need to run beside the CPU."""

    def __init__(self, nbytes: int):
        import ctypes

        cuda = driver()
        self.pointer = int(checked(cuda.cuMemAllocHost(max(nbytes, 1))))
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * max(nbytes, 1)).from_address(self.pointer))
        self._free = at_the_end(self, cuda.cuMemFreeHost, self.pointer)


class Stream:
    """Work in order; ``handle`` is the driver's."""

    def __init__(self) -> None:
        cuda = driver()
        stream = checked(cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.handle = int(stream)
        self._destroy = at_the_end(self, cuda.cuStreamDestroy, stream)

    def upload(self, pointer: int, array: np.ndarray) -> None:
        """Copies a C-contiguous array to the GPU; it may be changed as soon as this returns, unless it is page-locked."""
        checked(driver().cuMemcpyHtoDAsync(pointer, array.ctypes.data, array.nbytes, self.handle))

    def download(self, array: np.ndarray, pointer: int) -> None:
        """Fills a C-contiguous array from the GPU, once ``synchronize`` has returned."""
        checked(driver().cuMemcpyDtoHAsync(array.ctypes.data, pointer, array.nbytes, self.handle))

    def zero(self, pointer: int, nbytes: int) -> None:
        checked(driver().cuMemsetD8Async(pointer, 0, nbytes, self.handle))

    def synchronize(self) -> None:
        checked(driver().cuStreamSynchronize(self.handle))

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What ``enqueue`` puts on this stream, as a graph; nothing of it runs."""
        cuda = driver()
        checked(cuda.cuStreamBeginCapture(self.handle, cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            enqueue()
        except BaseException:
            cuda.cuStreamEndCapture(self.handle)
            raise
        return Graph(checked(cuda.cuStreamEndCapture(self.handle)))


class Graph:
    """Captured work, launched as one."""

    def __init__(self, captured: Any):
        cuda = driver()
        self._graph = checked(cuda.cuGraphInstantiate(captured, 0))
        checked(cuda.cuGraphDestroy(captured))
        self._destroy = at_the_end(self, cuda.cuGraphExecDestroy, self._graph)

    def launch(self, stream: Stream) -> None:
        checked(driver().cuGraphLaunch(self._graph, stream.handle))


class Event:
    """A point of a stream that the host can wait for."""

    def __init__(self) -> None:
        cuda = driver()
        self._event = checked(cuda.cuEventCreate(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        self._destroy = at_the_end(self, cuda.cuEventDestroy, self._event)

    def record(self, stream: Stream) -> None:
        """The point is behind all that the stream has been given."""
        checked(driver().cuEventRecord(self._event, stream.handle))

    def wait(self) -> None:
        checked(driver().cuEventSynchronize(self._event))
