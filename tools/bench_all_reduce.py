"""Times an all-reduce over all ranks, per size and way, beside a copy of the same bytes on one GPU; microseconds.

    python -m moecompiler.tools.bench_all_reduce OUTPUT.json [--ranks 2] [--dtype float16] [--sizes 4096 65536]

It starts the ranks itself, one on each GPU, counted round where there are fewer. ``one shot``, ``two shots``: kernels that write
to peers' memory; ``chosen``: which of them an engine takes; ``fused``: all-reduce, addition and norm in one kernel of rows of
``--hidden``; ``nccl`` where every rank has a GPU of its own; ``host``: through host memory, by pipes. Calls that a CUDA graph can
hold are timed in one, a chain of them one after another; the figure is the slowest rank's median.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from moecompiler.atomic import write_json_atomic
from moecompiler.errors import UserError
from moecompiler.plugins.collectives.kept import Collectives
from moecompiler.plugins.collectives.launch import USUAL, Sizes, one_shot_bytes
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.device import Buffer, checked, driver
from moecompiler.runtime.device_communicator import BYTES, DeviceCommunicator
from moecompiler.runtime.host_way import HostWay
from moecompiler.runtime.nccl import connect_nccl
from moecompiler.runtime.nccl_library import load_nccl
from moecompiler.runtime.peer_memory import current_gpu
from moecompiler.tools.gpu_ranks import GpuRank, join
from moecompiler.tools.spawned_ranks import results, run_spawned

SIZES = tuple(4096 << (2 * step) for step in range(8))  # 4 KiB to 64 MiB
WAYS = ("copy", "chosen", "one shot", "two shots", "fused", "nccl", "host")
MOST_ONCE = 4 << 20
_CHAIN, _LONG_CHAIN, _LONG = 20, 4, 2 << 20  # calls in a graph; of messages from so many bytes on
_LAUNCHES, _HOST_TURNS = 5, 5
_DTYPES = tuple(BYTES)


@dataclass(frozen=True)
class Row:
    """``nbytes`` of a message; microseconds of a call by way; a way that does not serve the size is not there."""

    nbytes: int
    microseconds: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """What a rank says: its GPU, how ranks see each other, why there is no NCCL, and its rows."""

    gpu: str
    bus: str
    how: str
    no_nccl: str | None
    rows: list[Row]


def measure(communicator: Communicator, dtype: str, sizes: Sequence[int], hidden: int) -> Measured:
    """One rank's part."""
    rank = join(communicator, dtype, sizes=Sizes(one_shot=MOST_ONCE))
    bus = current_gpu().bus
    nccl, no_nccl = _nccl(rank, communicator.gather_objects(bus))
    rows = []
    for nbytes in sizes:
        x, y, z = (Buffer(nbytes) for _ in range(3))
        rank.stream.zero(x.pointer, nbytes)
        times = {}
        for way, call in _calls(rank, nccl, nbytes, hidden, (x.pointer, y.pointer, z.pointer)).items():
            communicator.gather_objects(None)
            times[way] = _host_time(call) if way == "host" else _graph_time(rank, call, nbytes)
        rows.append(Row(nbytes, times))
    communicator.gather_objects(None)
    if nccl is not None:
        nccl.close()
    rank.way.leave()
    rank.way.close()
    return Measured(rank.device.info().name, bus, rank.how, no_nccl, rows)


def _nccl(rank: GpuRank, buses: list[str]) -> tuple[DeviceCommunicator | None, str | None]:
    if len({*buses}) < len(buses):
        return None, "ranks share a GPU"
    try:
        return connect_nccl(load_nccl(), rank.communicator, [rank.group]), None
    except UserError as error:
        return None, str(error)


def _calls(
    rank: GpuRank, nccl: DeviceCommunicator | None, nbytes: int, hidden: int, at: tuple[int, int, int]
) -> dict[str, Callable[[], Any]]:
    """What each way does once. Kernels of one shot are compiled for larger messages than engines', to see where they cross."""
    (x, y, z), stream, group = at, rank.stream.handle, rank.group
    elements, region = nbytes // BYTES[rank.dtype], rank.way.region(group)
    ways = {"one shot": Collectives(rank.data, MOST_ONCE), "two shots": Collectives(rank.data, 0)}
    usual = Collectives(rank.data, one_shot_bytes(len(group), USUAL))

    def by(kernels: Collectives) -> Callable[[], Any]:
        return lambda: kernels.all_reduce(x, y, elements, region, stream)

    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: checked(driver().cuMemcpyDtoDAsync(y, x, nbytes, stream)),
        "chosen": by(usual),
        "two shots": by(ways["two shots"]),
    }
    if nbytes <= MOST_ONCE:
        calls["one shot"] = by(ways["one shot"])
    rows = elements // hidden
    if rows and rows * hidden == elements and rank.kernels.norm_fits(rows, hidden, region):
        calls["fused"] = lambda: rank.kernels.all_reduce_add_rms_norm(
            (x, x, x), (y, z), rows, hidden, 1e-5, region, stream
        )
    if nccl is not None:
        calls["nccl"] = lambda: nccl.all_reduce(x, y, elements, rank.dtype, group, stream)
    if nbytes <= MOST_ONCE:
        host = HostWay(rank.communicator)
        calls["host"] = lambda: host.all_reduce(x, y, elements, rank.dtype, group, stream)
    return {way: calls[way] for way in WAYS if way in calls}


def _graph_time(rank: GpuRank, call: Callable[[], Any], nbytes: int) -> float:
    """Microseconds of one call of a chain in a graph, by the GPU's clock."""
    cuda, length = driver(), _CHAIN if nbytes < _LONG else _LONG_CHAIN
    call()
    rank.stream.synchronize()

    def chain() -> None:
        for _ in range(length):
            call()

    graph = rank.capture(chain)
    begin, end = (checked(cuda.cuEventCreate(0)) for _ in range(2))
    times = []
    for turn in range(_LAUNCHES + 2):
        checked(cuda.cuEventRecord(begin, rank.stream.handle))
        graph.launch(rank.stream)
        checked(cuda.cuEventRecord(end, rank.stream.handle))
        rank.stream.synchronize()
        if turn > 1:
            times.append(1000 * float(checked(cuda.cuEventElapsedTime(begin, end))) / length)
    for event in (begin, end):
        checked(cuda.cuEventDestroy(event))
    rank.way.check()
    return statistics.median(times)


def _host_time(call: Callable[[], Any]) -> float:
    """Microseconds of one call, which waits itself."""
    call()
    times = []
    for _ in range(_HOST_TURNS):
        begin = perf_counter()
        call()
        times.append(1e6 * (perf_counter() - begin))
    return statistics.median(times)


def slowest(ranks: Sequence[Measured]) -> list[Row]:
    """Of each size and way the time of the slowest rank."""
    return [
        Row(rows[0].nbytes, {way: max(row.microseconds[way] for row in rows) for way in rows[0].microseconds})
        for rows in zip(*(each.rows for each in ranks), strict=True)
    ]


def table(rows: Sequence[Row], title: str) -> Table:
    """For people."""
    ways = [way for way in WAYS if any(way in row.microseconds for row in rows)]
    shown = Table("KiB", *(f"{way}, µs" for way in ways), title=title, title_justify="left")
    for row in rows:
        times = (f"{row.microseconds[way]:.1f}" if way in row.microseconds else "" for way in ways)
        shown.add_row(f"{row.nbytes / 1024:g}", *times)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of all rows")
    parser.add_argument("--ranks", type=int, default=2, help="2 to 8 (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float16")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES")
    parser.add_argument(
        "--hidden", type=int, default=4096, help="elements of a row, for the fused kernel (%(default)s)"
    )
    parser.add_argument("--timeout_s", type=float, default=240.0, help="for all ranks together (%(default)g)")
    options = parser.parse_args(arguments)
    if not 2 <= options.ranks <= 8:
        parser.error("--ranks: give 2 to 8")
    if any(size < 16 or size % 16 for size in options.sizes):
        parser.error("--sizes: give multiples of 16")
    try:
        checked(driver().cuDeviceGetCount())
    except UserError as error:
        parser.error(str(error))
    told = (options.dtype, tuple(options.sizes), options.hidden)
    ranks: list[Measured] = results(run_spawned(options.ranks, measure, *told, timeout_s=options.timeout_s))
    gpus = len({each.bus for each in ranks})
    rows = slowest(ranks)
    title = f"all-reduce of {options.dtype} over {options.ranks} ranks on {gpus} × {ranks[0].gpu} ({ranks[0].how})"
    data = {
        "machine": {"gpu": ranks[0].gpu, "gpus": gpus, "date": date.today().isoformat()},
        "ranks": options.ranks,
        "dtype": options.dtype,
        "how": ranks[0].how,
        "no_nccl": ranks[0].no_nccl,
        "rows": [asdict(row) for row in rows],
    }
    write_json_atomic(options.output, data)
    Console(width=120).print(table(rows, title))
    if ranks[0].no_nccl:
        print(f"no NCCL: {ranks[0].no_nccl}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
