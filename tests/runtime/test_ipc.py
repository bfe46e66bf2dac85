"""How ranks come to see one another's memory, on fakes of the GPU: processes by handles, threads by pointers; and who cannot."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeDriver

from moecompiler.runtime import device, ipc, peer_memory
from moecompiler.runtime.collective_kernels import Region
from moecompiler.runtime.communicator import Communicator, current_communicator
from moecompiler.runtime.ipc import IpcCommunicator, connect
from moecompiler.runtime.threads import run_in_threads

BOTH = (0, 1)


class Handle:
    """``CUipcMemHandle``: 64 bytes, of which the fake uses 8."""

    def __init__(self) -> None:
        self.data = (ctypes.c_uint8 * 64)()

    def getPtr(self) -> int:
        return ctypes.addressof(self.data)


class PeerDriver(FakeDriver):
    """GPUs that see one another, rank ``r`` on ``gpus[r]``; opened memory lies a bit behind where its owner has it."""

    CUipcMemHandle = Handle
    CUipcMem_flags = SimpleNamespace(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS=1)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16)
    CUresult = SimpleNamespace(CUDA_ERROR_OUT_OF_MEMORY=2, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED=704)

    def __init__(self, gpus: Sequence[int]):
        super().__init__()
        self.gpus, self.reach = tuple(gpus), True
        self.opened: list[int] = []
        self.enabled: list[tuple[int, int]] = []

    def cuCtxGetDevice(self) -> tuple[Any, ...]:
        return 0, self.gpus[current_communicator().rank]

    def cuDeviceGetUuid(self, gpu: int) -> tuple[Any, ...]:
        return 0, SimpleNamespace(bytes=bytes([gpu] * 16))

    def cuDeviceGetPCIBusId(self, size: int, gpu: int) -> tuple[Any, ...]:
        return 0, f"0000:0{gpu}:00.0".encode() + b"\0" * (size - 12)

    def cuDeviceGetByPCIBusId(self, bus: bytes) -> tuple[Any, ...]:
        return 0, int(bus[5:7])

    def cuDeviceGetAttribute(self, attribute: int, gpu: int) -> tuple[Any, ...]:
        return 0, 132

    def cuDeviceCanAccessPeer(self, own: int, other: int) -> tuple[Any, ...]:
        return 0, int(self.reach)

    def cuIpcGetMemHandle(self, pointer: int) -> tuple[Any, ...]:
        handle = Handle()
        ctypes.memmove(handle.getPtr(), pointer.to_bytes(8, "little"), 8)
        return 0, handle

    def cuIpcOpenMemHandle(self, handle: Handle, flags: int) -> tuple[Any, ...]:
        assert flags == 1
        self.opened.append(int.from_bytes(bytes(handle.data[:8]), "little") + 1)
        return 0, self.opened[-1]

    def cuIpcCloseMemHandle(self, pointer: int) -> tuple[Any, ...]:
        self.opened.remove(pointer)
        return (0,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return 0, ordinal

    def cuDevicePrimaryCtxRetain(self, gpu: int) -> tuple[Any, ...]:
        return 0, 100 + gpu

    def cuDevicePrimaryCtxRelease(self, gpu: int) -> tuple[Any, ...]:
        return (0,)

    def cuCtxEnablePeerAccess(self, context: int, flags: int) -> tuple[Any, ...]:
        self.enabled.append((current_communicator().rank, context))
        return (0,)


class NotSupported(int):
    name = "CUDA_ERROR_NOT_SUPPORTED"


class Kernels:
    """Notes what it is asked for; ``told`` is where it is to complain."""

    dtype, region_bytes, most_ranks = "float16", 256, 2

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.pointers: tuple[int, ...] = ()
        self.told = 0

    def head(self, rank: int, pointers: Sequence[int], patience_ns: int, told: int) -> bytes:
        self.rank, self.pointers, self.told = rank, tuple(pointers), told
        assert patience_ns == 3_000_000_000
        return b"head"

    def all_reduce(self, x: int, y: int, elements: int, region: Region, stream: int) -> None:
        self.calls.append((x, y, elements, region, stream))

    def norm_fits(self, rows: int, hidden: int, region: Region) -> bool:
        return rows == 1


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``place(gpus, processes, hosts)`` puts ranks there."""

    def put(gpus: Sequence[int], processes: Sequence[int], hosts: Sequence[str]) -> PeerDriver:
        driver = PeerDriver(gpus)
        for module in (device, peer_memory):
            monkeypatch.setattr(module, "driver", lambda: driver)
        monkeypatch.setattr(ipc.os, "getpid", lambda: processes[current_communicator().rank])
        monkeypatch.setattr(ipc.platform, "node", lambda: hosts[current_communicator().rank])
        return driver

    return put


def joined(communicator: Communicator, kernels: Kernels | None) -> tuple[IpcCommunicator | None, str]:
    return connect(communicator, [BOTH], kernels, patience_s=3.0)


def test_processes(place: Any) -> None:
    """Each opens the other's region; regions are empty but for their heads; what a kernel complains of is an error."""
    driver = place([0, 1], [10, 11], ["here", "here"])

    def run(communicator: Communicator) -> None:
        kernels = Kernels()
        way, how = joined(communicator, kernels)
        assert way is not None
        assert how == "CUDA IPC between processes"
        assert (kernels.rank, way.capturable, way.takes(1, BOTH), way.takes(1, (0,))) == (
            communicator.rank,
            True,
            True,
            False,
        )
        others = communicator.gather_objects(kernels.pointers)
        own = others[communicator.rank][communicator.rank]
        peer = 1 - communicator.rank
        assert others[peer][communicator.rank] == own + 1
        assert driver.array(own, (256,), np.uint8).tobytes() == b"head".ljust(256, b"\0")
        way.all_reduce(16, 32, 5, "float16", BOTH, 7)
        assert kernels.calls == [(16, 32, 5, Region(own, 2, 132), 7)]
        assert way.norm_fits(1, 64, "float16", BOTH)
        assert not way.norm_fits(1, 64, "float32", BOTH)
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            way.all_reduce(16, 33, 5, "float16", BOTH, 7)
        with pytest.raises(ValueError, match="are for float16, not for float32"):
            way.all_reduce(16, 32, 5, "float32", BOTH, 7)
        way.check()
        ctypes.c_uint32.from_address(kernels.told).value = 2
        with pytest.raises(RuntimeError, match=r"waited in vain for a peer \(the group's member 2\)"):
            way.check()
        way.leave()
        communicator.gather_objects(None)
        assert driver.opened == []
        way.close()

    run_in_threads(2, run)


def test_threads(place: Any) -> None:
    """Pointers are shared as they are, GPUs made to reach each other, and ranks meet around a launch."""
    driver = place([0, 1], [10, 10], ["here", "here"])

    def run(communicator: Communicator) -> Any:
        kernels = Kernels()
        way, how = joined(communicator, kernels)
        assert way is not None
        assert (how, way.capturable) == ("threads of one process", False)
        way.all_reduce(16, 32, 5, "float16", BOTH, 7)
        way.leave()
        return kernels.pointers

    first, second = run_in_threads(2, run)
    assert first == second
    assert sorted(driver.enabled) == [(0, 101), (1, 100)]
    assert driver.opened == []


def test_one_gpu_for_all(place: Any) -> None:
    """A launch takes no more programs than find room beside those of the others."""
    place([0, 0], [10, 11], ["here", "here"])

    def run(communicator: Communicator) -> int:
        kernels = Kernels()
        way, _ = joined(communicator, kernels)
        assert way is not None
        way.all_reduce(16, 32, 5, "float16", BOTH, 7)
        return int(kernels.calls[0][3].programs)

    assert run_in_threads(2, run) == [66, 66]


@pytest.mark.parametrize("trouble", ["host", "kernels", "reach", "memory", "handle"])
def test_all_do_without(trouble: str, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of them cannot, none keeps a peer's memory open; all say why."""
    driver = place([0, 1], [10, 11], ["here", "there" if trouble == "host" else "here"])
    driver.reach = trouble != "reach"
    if trouble == "memory":
        driver.free = 300
    if trouble == "handle":
        monkeypatch.setattr(driver, "cuIpcGetMemHandle", lambda pointer: (NotSupported(801), None))

    def run(communicator: Communicator) -> str:
        kernels = None if trouble == "kernels" and communicator.rank == 1 else Kernels()
        way, why = joined(communicator, kernels)
        assert way is None
        return why

    wanted = {
        "host": "rank 0 is on here, rank 1 on there",
        "kernels": "rank 1: the engine holds no kernels for collectives",
        "reach": "CUDA: the GPUs cannot reach one another's memory",
        "memory": "the GPU has no room for the memory of collectives",
        "handle": "rank 1's driver shares no memory between processes",
    }[trouble]
    reasons = run_in_threads(2, run)
    assert any(wanted in reason for reason in reasons), reasons
    assert all(reasons)
    assert driver.opened == []
