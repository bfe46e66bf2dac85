"""Where each rank's GPU is, which others it reaches, and what is installed there: what ways are chosen from."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.device import checked, driver
from moecompiler.runtime.nccl_library import load_nccl
from moecompiler.runtime.ways import Endpoint


@dataclass(frozen=True)
class _Gpu:
    """A rank's host and GPU, by PCI address."""

    host: str
    bus: str


def gather_endpoints(communicator: Communicator, no_ipc: str | None = None) -> list[Endpoint]:
    """Every rank's, in rank order; called by all ranks together, each with its GPU current. ``no_ipc``: why this rank's engine
    cannot use CUDA IPC, where it cannot."""
    cuda, host = driver(), platform.node()
    device = checked(cuda.cuCtxGetDevice())
    own = _Gpu(host, _bus(device))
    everyone: list[_Gpu] = communicator.gather_objects(own)
    near = {each.bus for each in everyone if each.host == host}
    reached = frozenset(bus for bus in near if bus == own.bus or _reaches(device, bus))
    end = Endpoint(communicator.rank, host, os.getpid(), own.bus, reached, no_ipc, _no_nccl())
    return list(communicator.gather_objects(end))


def _bus(device: object) -> str:
    """``0000:3b:00.0``."""
    address: bytes = checked(driver().cuDeviceGetPCIBusId(32, device))
    return address.split(b"\0")[0].decode().lower()


def _reaches(device: object, bus: str) -> bool:
    """Whether a GPU's memory can be mapped by another's; not where this process does not see that one."""
    cuda = driver()
    status, other = cuda.cuDeviceGetByPCIBusId(bus.encode())
    return not int(status) and bool(checked(cuda.cuDeviceCanAccessPeer(device, other)))


def _no_nccl() -> str | None:
    try:
        load_nccl()
    except UserError as error:
        return str(error)
    return None
