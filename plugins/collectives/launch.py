"""Plans of exchanges: which kernel for which message, in which pieces. ``exchange.cuh`` says how they work.

A region's layout is the kernels' (``struct Region``); the host writes its head alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moecompiler.plugins.launch import CudaKernel, Launch
from moecompiler.runtime.collective_kernels import Region
from moecompiler.runtime.device_communicator import BYTES

MOST_RANKS = 8
THREADS, PROGRAMS = 512, 48
ONE_SHOT = 512 << 10
SLOT = 8 << 20
_SOURCE = "moecompiler.plugins.collectives/exchange.cu"
_NORM_SOURCE = "moecompiler.plugins.collectives/norm.cu"
_ELEMENTS = {"float16": 0, "bfloat16": 1, "float32": 2}
_HEAD = struct.Struct("<3I 2I I 2Q 8Q")
_MOST_VECTORS = 4  # of a row of ``one_shot_norm``, a thread


@dataclass(frozen=True)
class Sizes:
    """Of a region, as its kernels are compiled: ``threads`` of a program, a power of two; most ``programs``, a multiple of 4;
    bytes of a message ``one_shot`` at most, and of a ``slot``, the most that one launch of the other kernels takes, of 128."""

    threads: int = THREADS
    programs: int = PROGRAMS
    one_shot: int = ONE_SHOT
    slot: int = SLOT

    @property
    def region(self) -> int:
        """Bytes of a region: ``sizeof(Region)``."""
        flags = 2 * MOST_RANKS * self.programs * 4
        lines = 2 * MOST_RANKS * self.one_shot * 2
        bulk = 2 * 2 * (self.slot + 16 * MOST_RANKS)
        return -(-(256 + flags + lines + bulk) // 256) * 256

    @property
    def gathered(self) -> int:
        """Bytes of a rank's part of an all-gather that one launch takes."""
        return 2 * (self.slot + 16 * MOST_RANKS) // MOST_RANKS // 16 * 16


USUAL = Sizes()


def head(rank: int, regions: Sequence[int], patience_ns: int, told: int) -> bytes:
    """What a region begins with before its first turn: ``rank`` is a place among ``regions``, the addresses of all as this rank
    sees them; a peer has ``patience_ns`` to come, else the host's word at ``told`` says so."""
    peers = [*regions, *[0] * (MOST_RANKS - len(regions))]
    return _HEAD.pack(0, 0, 0, rank, len(regions), 0, patience_ns, told, *peers)


def kernels(dtype: str, sizes: Sizes = USUAL) -> dict[str, CudaKernel]:
    """Those that exchange messages of a type, by name."""
    macros = (
        ("ELEMENT", _ELEMENTS[dtype]),
        ("THREADS", sizes.threads),
        ("PROGRAMS", sizes.programs),
        ("ONE_SHOT", sizes.one_shot),
        ("SLOT", sizes.slot),
        ("REGION", sizes.region),
    )
    message = (("x", "*u8"), ("y", "*u8"), ("own", "*u8"))
    box = (("rows", "i32"), ("width", "i32"), ("pitch", "i32"), ("unit", "i32"))
    rows = (("rows", "i32"), ("hidden", "i32"), ("epsilon", "fp32"))
    norm = (("residual", "*u8"), ("branch", "*u8"), ("weight", "*u8"), ("y", "*u8"), ("x", "*u8"), ("own", "*u8"))
    takes = {
        "one_shot": (_SOURCE, (*message, ("elements", "i32"))),
        "two_shot": (_SOURCE, (*message, ("elements", "i32"))),
        "gather": (_SOURCE, (*message, *box)),
        "one_shot_norm": (_NORM_SOURCE, (*norm, *rows)),
    }
    warps = sizes.threads // 32
    return {name: CudaKernel(source, name, signature, macros, warps, 0) for name, (source, signature) in takes.items()}


def one_shot_bytes(ranks: int, sizes: Sizes) -> int:
    """The largest message that is sent whole to every peer. A rank's link then carries ``2 (n - 1)`` times its bytes, and with
    two shots ``2 (n - 1) / n`` times, after more waits: the more ranks, the sooner two are faster."""
    return sizes.one_shot // (1 if ranks == 2 else 2 if ranks <= 4 else 4)


def all_reduce(
    x: int, y: int, elements: int, dtype: str, region: Region, sizes: Sizes, most_once: int | None = None
) -> Iterator[tuple[str, Launch]]:
    """Launches by the names of their kernels. ``x``, ``y``: device pointers, multiples of 16; ``most_once``: bytes of a message
    that takes one shot, where that is not ``one_shot_bytes``."""
    if most_once is None:
        most_once = one_shot_bytes(region.ranks, sizes)
    width = BYTES[dtype]
    most = sizes.slot // width
    if 0 < elements * width <= most_once:
        yield "one_shot", _launch(_programs(elements * width, 1, region, sizes), x, y, region.pointer, elements)
        return
    for first in range(0, elements, most):
        count, at = min(most, elements - first), first * width
        programs = _programs(count * width, 2 * region.ranks, region, sizes)
        yield "two_shot", _launch(programs, x + at, y + at, region.pointer, count)


def all_gather(
    x: int, y: int, rows: int, columns: int, dtype: str, region: Region, sizes: Sizes
) -> Iterator[tuple[str, Launch]]:
    """As ``all_reduce``: in boxes of rows and columns where the whole is more than a launch takes."""
    width = BYTES[dtype]
    row = columns * width
    if not rows or not columns:
        return
    unit = next(each for each in (16, 8, 4, 2) if not row % each)  # whatever differs between ranks must not decide
    wide = min(row, sizes.gathered // unit * unit)
    high = max(1, sizes.gathered // wide)
    for top in range(0, rows, high):
        for left in range(0, row, wide):
            box = min(high, rows - top), min(wide, row - left)
            programs = _programs(box[0] * box[1] * 16 // unit, 2, region, sizes)
            source, target = x + top * row + left, y + top * row * region.ranks + left
            yield "gather", _launch(programs, source, target, region.pointer, box[0], box[1] // unit, row // unit, unit)


def norm_fits(rows: int, hidden: int, dtype: str, region: Region, sizes: Sizes) -> bool:
    """Whether ``one_shot_norm`` takes rows of ``hidden`` elements."""
    nbytes = hidden * BYTES[dtype]
    wide_enough = nbytes % 16 == 0 and nbytes <= 16 * _MOST_VECTORS * sizes.threads
    return wide_enough and 0 < rows * nbytes <= one_shot_bytes(region.ranks, sizes)


def one_shot_norm(
    inputs: tuple[int, int, int],
    outputs: tuple[int, int],
    rows: int,
    hidden: int,
    epsilon: float,
    region: Region,
    sizes: Sizes,
) -> tuple[str, Launch]:
    """``inputs``: residual, branch, weight; ``outputs``: y, x: see ``CollectiveKernels``."""
    return "one_shot_norm", _launch(
        min(rows, sizes.programs, region.programs), *inputs, *outputs, region.pointer, rows, hidden, epsilon
    )


def _programs(nbytes: int, vectors: int, region: Region, sizes: Sizes) -> int:
    """So many that each thread has that many vectors, if there may be."""
    return max(1, min(sizes.programs, region.programs, -(-nbytes // (16 * vectors * sizes.threads))))


def _launch(programs: int, *args: int | float) -> Launch:
    return Launch(0, (programs, 1, 1), args)
