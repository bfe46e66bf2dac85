"""Memory of one GPU process that others see: CUDA's interprocess handles, and peers' GPUs (CUDA Driver API, "IPC", "Peer Context
Memory Access")."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from moecompiler.runtime.device import DeviceError, checked, driver

_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE


@dataclass(frozen=True)
class Gpu:
    """The current GPU as other processes know it. ``ordinal`` means something in this process alone; ``multiprocessors``: how
    many it has."""

    uuid: bytes
    bus: str
    ordinal: int
    multiprocessors: int


def current_gpu() -> Gpu:
    """Raises: DeviceError where the driver does not say."""
    cuda = driver()
    device = checked(cuda.cuCtxGetDevice())
    uuid = checked(cuda.cuDeviceGetUuid(device))
    bus = checked(cuda.cuDeviceGetPCIBusId(64, device)).split(b"\0")[0].decode()
    attribute = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    count = int(checked(cuda.cuDeviceGetAttribute(attribute, device)))
    return Gpu(bytes(uuid.bytes)[:16], bus, int(device), count)


def handle_of(pointer: int) -> bytes:
    """What another process opens memory by that was allocated at ``pointer``. Raises: DeviceError where there is nothing."""
    handle = checked(driver().cuIpcGetMemHandle(pointer))
    return ctypes.string_at(handle.getPtr(), _HANDLE_BYTES)


def open_handle(data: bytes) -> int:
    """Another process's memory, as the current context sees it. Raises: DeviceError where it does not."""
    cuda = driver()
    handle = cuda.CUipcMemHandle()
    ctypes.memmove(handle.getPtr(), data, _HANDLE_BYTES)
    return int(checked(cuda.cuIpcOpenMemHandle(handle, cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)))


def close_handle(pointer: int) -> None:
    """Lets go of what ``open_handle`` gave."""
    checked(driver().cuIpcCloseMemHandle(pointer))


def check_reach(peer: Gpu) -> None:
    """Raises: DeviceError where the current GPU cannot write to ``peer``'s memory. Where this process is not shown that GPU,
    whether it can is found out by trying."""
    cuda = driver()
    own = checked(cuda.cuCtxGetDevice())
    status, device = cuda.cuDeviceGetByPCIBusId(peer.bus.encode())
    if int(status) or int(device) == int(own):
        return
    if not checked(cuda.cuDeviceCanAccessPeer(own, device)):
        raise DeviceError("CUDA: the GPUs cannot reach one another's memory")


def reach_within_process(peer: Gpu) -> None:
    """Makes memory of another GPU of this process usable in the current context. Raises: DeviceError where it cannot be."""
    cuda = driver()
    own = checked(cuda.cuCtxGetDevice())
    if int(own) == peer.ordinal:
        return
    context = _primary_context(cuda, peer.ordinal)
    status = cuda.cuCtxEnablePeerAccess(context, 0)[0]
    if int(status) != int(cuda.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED):
        checked((status,))


def _primary_context(cuda: Any, ordinal: int) -> Any:
    """Kept by the peer, who uses it."""
    device = checked(cuda.cuDeviceGet(ordinal))
    context = checked(cuda.cuDevicePrimaryCtxRetain(device))
    checked(cuda.cuDevicePrimaryCtxRelease(device))
    return context
