"""What a plugin launches, as data: kernels to compile, what compiling them gives, and plans of launches.

An op's folder has ``kernels.py``, Triton functions only, where Triton falls short of the hardware CUDA C++ (``.cu``) too, and
``launch.py``, whose ``tactics(op, attributes, dims, dtype, sm)``
says which ways there are to compute the op (``dims``: the inputs' shapes as far as the build knows them, -1 for what it does not;
``dtype``: ``float16``, ``bfloat16`` or ``float32``), none where only the op's body can. ``compile.py`` makes a ``Cubin`` of each
``Kernel``, for any SM, without a GPU; ``driver.py`` loads and launches them. Nothing here or in a plan needs Triton, so running
an engine does not either.

Triton's kernels take two hidden pointers after their own arguments: global scratch, of ``Cubin.scratch`` bytes per program of
the grid (null where that is 0), and a profiler's (always null). CUDA C++'s take none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

ALIGNMENT = 256
"""Of every part of the workspace, in bytes; global scratch needs 128."""

Dims = tuple[tuple[int, ...], ...]
"""The shapes of all inputs of a node, in order."""

TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Kernel:
    """A Triton function to be compiled.

    ``signature`` gives each argument's Triton type in order, constexprs left out: ``*fp16``, ``i32``, ``fp32``; ``:16`` behind it
    promises that the pointer or number is a multiple of 16, as in ``triton.tools.compile``. ``constants`` are the constexprs.
    """

    module: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | float | bool | str], ...]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class CudaKernel:
    """A CUDA C++ function to be compiled by NVRTC.

    ``source`` names a file of the package, as ``moecompiler.plugins.moe/grouped.cu``; ``constants`` become macros of it.
    ``signature`` is as Triton's, with ``tensormap`` besides. ``shared``: bytes of dynamic shared memory.
    """

    source: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | float | bool | str], ...]
    num_warps: int
    shared: int


AnyKernel = Kernel | CudaKernel


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel: ``name`` is its entry in ``image``, ``shared`` its dynamic shared memory in bytes (above 48 KB the
    function's attribute has to be raised), ``scratch`` its global scratch in bytes per program."""

    image: bytes
    name: str
    shared: int
    num_warps: int
    scratch: int

    def to_bytes(self) -> bytes:
        """A line of JSON, then the image: what an INT8 plugin field holds."""
        header = {"name": self.name, "shared": self.shared, "num_warps": self.num_warps, "scratch": self.scratch}
        return json.dumps(header).encode() + b"\n" + self.image

    @staticmethod
    def from_bytes(data: bytes) -> Cubin:
        header, _, image = data.partition(b"\n")
        return replace(Cubin(image, "", 0, 0, 0), **json.loads(header))


@dataclass(frozen=True)
class Input:
    """The address of the node's input ``index``."""

    index: int


@dataclass(frozen=True)
class Output:
    """The address of the node's output ``index``; an aliased output's is its input's."""

    index: int


@dataclass(frozen=True)
class Workspace:
    """The address ``offset`` bytes into the node's workspace."""

    offset: int


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine sees memory from ``base`` on: ``sizes`` and ``box`` in elements, ``float16``, ``bfloat16`` or ``int8``
    (bytes of any meaning), the axis of adjacent ones last; ``strides`` in elements, one less than there are axes. A box lies in
    shared memory as swizzled rows of 128 bytes; what of it is outside of ``sizes`` arrives as zeros (CUDA Driver API,
    ``cuTensorMapEncodeTiled``)."""

    base: Input | Output | Workspace
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


Argument = Input | Output | Workspace | TensorMap | int | float


@dataclass(frozen=True)
class Launch:
    """One launch: ``kernel`` is an index into the tactic's kernels, ``args`` are in the order of its signature.

    With ``overlapped`` it is launched with the attribute ``PROGRAMMATIC_STREAM_SERIALIZATION`` set to 1: it may start while the
    launch before it ends, and waits for it itself (``griddepcontrol.wait``). A plan's first launch is never overlapped.
    ``cluster`` programs, adjacent along the grid's first axis, run at the same time and share their shared memory. Of
    ``persistent`` programs there are no more than the card has multiprocessors: they divide the work among themselves.
    """

    kernel: int
    grid: tuple[int, int, int]
    args: tuple[Argument, ...]
    overlapped: bool = False
    cluster: int = 1
    persistent: bool = False


class Tactic(Protocol):
    """One way to compute a node. It is right for all shapes; which tactic is fastest for which, the backend times."""

    @property
    def name(self) -> str: ...

    @property
    def kernels(self) -> tuple[AnyKernel, ...]: ...

    def workspace(self, dims: Dims) -> int:
        """Bytes of workspace, a multiple of ``ALIGNMENT``, without global scratch; grows with each dim."""
        ...

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        """The launches for inputs of these shapes, in order. The grids depend on nothing else."""
        ...


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def multiprocessors(sm: int) -> int:
    """How many multiprocessors the largest usual card of a compute capability has: a grid's size, not a promise."""
    return {75: 72, 80: 108, 86: 84, 87: 16, 89: 142, 90: 132, 100: 148, 103: 148, 120: 188}.get(sm, 128)


def shared_memory(sm: int) -> int:
    """Bytes of shared memory that one program can have (CUDA C++ Programming Guide, table of compute capabilities)."""
    return {75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(sm, 99) * 1024


def scratch_bytes(launches: Sequence[Launch], cubins: Sequence[Cubin] | Mapping[int, Cubin]) -> int:
    """Bytes of global scratch that the launches need, one after another, behind the tactic's own workspace."""
    return max((cubins[launch.kernel].scratch * math.prod(launch.grid) for launch in launches), default=0)


class Arena:
    """Parts of a workspace, one behind another.."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, count: int) -> Workspace:
        """A part of ``count`` bytes."""
        part = Workspace(self.size)
        self.size += -(-count // ALIGNMENT) * ALIGNMENT
        return part
