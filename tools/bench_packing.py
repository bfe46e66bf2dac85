"""How fast ranks' weights are packed, beside `cp` of the same bytes; run by ``bench_export``.

Both are timed to the point where the bytes are on the disk (fsync), from a source that the page cache holds and from one that it
does not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from moecompiler.artifact import Artifact
from moecompiler.atomic import sync
from moecompiler.config import ModelConfig, load_config
from moecompiler.sparse_checkpoint import write_sparse_checkpoint
from moecompiler.tools.export import run_export
from moecompiler.tools.flags import GraphFlags, MappingFlags, SourceFlags, WorkFlags
from moecompiler.tools.job import make_job

SHARE_OF_CP = 0.7  # what is asked for
LEAST_BYTES = 4 << 30
MAPPINGS = {
    "one rank": MappingFlags(),
    "tp8": MappingFlags(tp_size=8),
    "ep8": MappingFlags(tp_size=8, moe_ep_size=8),
}
REPEATS = 3
_BLOCK = 64 << 20


@dataclass(frozen=True)
class Packing:
    """``packed_bytes`` of all ranks' files in ``seconds``, and ``cp`` of these files in ``cp_seconds``. ``cached``: whether the
    page cache held what was read. ``plain_seconds``: the same export without packing, which is not counted. Seconds
    are medians of ``REPEATS``, taken in turns: a shared disk's speed varies several times over from one minute to the next."""

    mapping: str
    cached: bool
    workers: int
    packed_bytes: int
    seconds: float
    cp_seconds: float
    plain_seconds: float

    @property
    def share(self) -> float:
        return self.cp_seconds / self.seconds

    @property
    def misses(self) -> bool:
        return self.share < SHARE_OF_CP


def layers_for(config: ModelConfig, least: int) -> ModelConfig:
    """The model with as few layers as hold ``least`` bytes of experts."""
    layer = 3 * config.num_local_experts * config.intermediate_size * config.hidden_size * 2
    return config.with_layers(min(config.num_hidden_layers, -(-least // layer)))


def fill(directory: Path) -> None:
    """Gives the sparse files of a checkpoint numbers: a block of normal ones, again and again."""
    numbers = np.random.default_rng(0).normal(0, 0.02, _BLOCK // 4).astype(np.float32)
    block = memoryview((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes())  # bfloat16
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("r+b", buffering=0) as file:
            at = 8 + int.from_bytes(file.read(8), "little")
            end = path.stat().st_size
            while at < end:
                at += os.pwrite(file.fileno(), block[: end - at], at)
        sync(path)


def measure_packing(model: str, output: Path, mappings: Sequence[str]) -> list[Packing]:
    """A row for each mapping, source in the page cache or not, printed as they are made. Everything written goes again."""
    checkpoint = output / "checkpoint"
    config = replace(layers_for(load_config(model), LEAST_BYTES), dtype="bfloat16")
    write_sparse_checkpoint(config, checkpoint)
    fill(checkpoint)
    print(
        "\n| mapping | read from | GB | packed, s | GB/s | cp, s | GB/s | of cp | |\n|---|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for mapping in mappings:
        for cached in (True, False):
            row = _measure(mapping, MAPPINGS[mapping], cached, checkpoint, output / "work")
            rows.append(row)
            print(_table_row(row), flush=True)
    shutil.rmtree(checkpoint)
    return rows


def _measure(mapping: str, flags: MappingFlags, cached: bool, checkpoint: Path, work: Path) -> Packing:
    shards = sorted(checkpoint.glob("*.safetensors"))
    job = make_job(SourceFlags(model_dir=checkpoint), flags, GraphFlags())
    workers = min(job.mapping.world_size, len(os.sched_getaffinity(0)))
    run_export(job, work / "plain", WorkFlags())  # imports what export needs
    shutil.rmtree(work / "plain")
    plain = _seconds(lambda: run_export(job, work / "plain", WorkFlags()))
    packing, copying, size = [], [], 0
    for _ in range(REPEATS):
        os.sync()
        _keep_or_drop(shards, cached)
        both = _seconds(lambda: run_export(job, work / "packed", WorkFlags(workers=workers), pack_weights=True))
        packing.append(both - plain)
        artifact = Artifact.open(work / "packed")
        files = [artifact.path(f"rank{rank}.safetensors") for rank in artifact.ranks]
        size = sum(path.stat().st_size for path in files)
        os.sync()
        _keep_or_drop(files, cached)
        (work / "copy").mkdir()
        copying.append(_seconds(partial(_copy, files, work / "copy")))
        for done in ("packed", "copy"):
            shutil.rmtree(work / done)
    shutil.rmtree(work)
    return Packing(mapping, cached, workers, size, median(packing), median(copying), plain)


def _copy(files: Iterable[Path], to: Path) -> None:
    """``cp``, one file after another, each to the disk, as packed files are."""
    for path in files:
        subprocess.run(["cp", path, to / path.name], check=True)
        sync(to / path.name)


def _keep_or_drop(paths: Iterable[Path], cached: bool) -> None:
    """Has the page cache hold the files, or not."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            if not cached:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            while file.read(_BLOCK):
                pass


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _table_row(row: Packing) -> str:
    size = row.packed_bytes / 1e9
    read = "the page cache" if row.cached else "the disk"
    packed, copied = (
        f"{row.seconds:.1f} | {size / row.seconds:.2f}",
        f"{row.cp_seconds:.1f} | {size / row.cp_seconds:.2f}",
    )
    verdict = "misses" if row.misses else "ok"
    return f"| {row.mapping} | {read} | {size:.2f} | {packed} | {copied} | {row.share:.0%} | {verdict} |"
