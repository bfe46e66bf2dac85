"""Export and optimize of whole models: peak memory, time and bytes written of every rank; and packing beside `cp`.

    python -m moecompiler.tools.bench_export --output build/bench-export
    python -m moecompiler.tools.bench_export --output build/bench-packing --only packing

The checkpoints are sparse (`moecompiler.tools.sparse_checkpoint`): true names, shapes and shards, and no weight is read. Packing
reads real numbers, of two layers of a model, and is timed beside `cp` of the files that it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from moecompiler.atomic import write_json_atomic
from moecompiler.config import PRESETS
from moecompiler.sparse_checkpoint import write_sparse_checkpoint
from moecompiler.tools.bench_packing import MAPPINGS as PACKING_MAPPINGS
from moecompiler.tools.bench_packing import measure_packing

MAPPINGS = {
    "tp8": (8, ("--tp_size", "8")),
    "ep8": (8, ("--tp_size", "8", "--moe_ep_size", "8")),
    "tp4×ep2·pp2": (16, ("--tp_size", "8", "--moe_tp_size", "4", "--moe_ep_size", "2", "--pp_size", "2")),
}
PEAK_GIB, SECONDS_A_RANK, WRITTEN_SHARE = 3.0, 60.0, 0.01  # what is asked for


@dataclass(frozen=True)
class Used:
    """Of a command and all its processes: wall and CPU seconds; GiB of the largest process (resident set); exit status."""

    wall_s: float
    cpu_s: float
    peak_gib: float
    status: int


@dataclass(frozen=True)
class Row:
    """Export and optimize of ``ranks`` ranks. ``written``: bytes of both output directories, for all ranks of the world;
    ``weights``: those of the checkpoint."""

    model: str
    mapping: str
    ranks: int
    workers: int
    export: Used
    optimize: Used
    written: int
    weights: int

    @property
    def peak_gib(self) -> float:
        return max(self.export.peak_gib, self.optimize.peak_gib)

    @property
    def seconds_a_rank(self) -> float:
        """Wall seconds of both steps for each rank; an upper bound where one rank is done alone, start included."""
        return (self.export.wall_s + self.optimize.wall_s) / self.ranks

    @property
    def misses(self) -> list[str]:
        wrong = {
            "failed": self.export.status or self.optimize.status,
            f"peak over {PEAK_GIB} GiB": self.peak_gib > PEAK_GIB,
            f"over {SECONDS_A_RANK} s a rank": self.seconds_a_rank > SECONDS_A_RANK,
            f"wrote over {WRITTEN_SHARE:.0%}": self.written > WRITTEN_SHARE * self.weights,
        }
        return [what for what, is_so in wrong.items() if is_so]


_RUN = """
import json, os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
print(json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""


def timed(command: Sequence[object]) -> Used:
    """Runs a command; what it prints goes to stderr. Memory is that of the largest process among it and its children.

    A process of its own starts it, a small one: to Linux the peak of who starts a program is the program's too.
    """
    words = [str(word) for word in command]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _RUN, *words], stdout=subprocess.PIPE, check=True, text=True
    )
    wall = time.perf_counter() - started
    cpu, peak, status = json.loads(done.stdout)
    return Used(wall, cpu, peak / (1 << 20), status)


def measure(
    model: str, mapping: str, checkpoint: Path, workers: int, folder: Path, weights: int, rank: int | None
) -> Row:
    """Exports and optimizes into ``folder``, which is removed: all ranks, or one."""
    world, options = MAPPINGS[mapping]
    program = (sys.executable, "-m", "moecompiler.tools.main")
    chosen = ("--workers", workers) if rank is None else ("--rank", rank)
    source = ("--model_dir", checkpoint, "--output_dir", folder / "export")
    export = timed([*program, "export", *source, *options, *chosen])
    given = ("--checkpoint_dir", folder / "export", "--output_dir", folder / "optimize")
    optimize = timed([*program, "optimize", *given, "--pipeline", "plugins", *chosen])
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    if rank is not None:
        written *= world
    return Row(model, mapping, world if rank is None else 1, workers, export, optimize, written, weights)


def table_row(row: Row) -> str:
    def times(used: Used) -> str:
        return f"{used.wall_s:.1f} ({used.cpu_s:.1f})"

    ranks = f"{row.ranks}, {row.workers} at once" if row.ranks > 1 else "1"
    share = f"{row.written / row.weights:.3%}"
    cells = (row.model, row.mapping, ranks, times(row.export), times(row.optimize), f"{row.seconds_a_rank:.1f}")
    verdict = ", ".join(row.misses) or "ok"
    return "| " + " | ".join((*cells, f"{row.peak_gib:.2f}", share, verdict)) + " |"


HEAD = (
    "| model | mapping | ranks | export, s (CPU) | optimize, s (CPU) | s a rank | peak GiB a process | written | |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def measure_all(output: Path, models: Sequence[str], mappings: Sequence[str], workers: Sequence[int]) -> list[Row]:
    """A row for one rank alone, and one for all ranks with each number of ``workers``, printed as they are made."""
    rows = []
    print(HEAD, flush=True)
    for model in models:
        checkpoint = output / f"sparse-{model}"
        weights = write_sparse_checkpoint(PRESETS[model], checkpoint)
        for mapping in mappings:
            for count, rank in [(1, 0), *((each, None) for each in workers)]:
                row = measure(model, mapping, checkpoint, count, output / "work", weights, rank)
                rows.append(row)
                print(table_row(row), flush=True)
        shutil.rmtree(checkpoint)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Where results go; it is emptied.")
    parser.add_argument("--models", nargs="+", choices=sorted(PRESETS), default=sorted(PRESETS, reverse=True))
    parser.add_argument("--mappings", nargs="+", choices=list(MAPPINGS), default=list(MAPPINGS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--only", choices=("export", "packing"))
    parser.add_argument("--packing_config", default="8x7b", help="Of the model one layer of which is packed.")
    parser.add_argument("--packing", nargs="+", choices=list(PACKING_MAPPINGS), default=list(PACKING_MAPPINGS))
    options = parser.parse_args(arguments)
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    rows = (
        measure_all(options.output, options.models, options.mappings, options.workers)
        if options.only != "packing"
        else []
    )
    packing = (
        [] if options.only == "export" else measure_packing(options.packing_config, options.output, options.packing)
    )
    machine = {
        "date": date.today().isoformat(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("onnx", "onnx-graphsurgeon", "torch")},
    }
    result = {
        "machine": machine,
        "export": [asdict(row) for row in rows],
        "packing": [asdict(each) for each in packing],
    }
    write_json_atomic(options.output / "export.json", result)
    return int(any(row.misses for row in rows) or any(each.misses for each in packing))


if __name__ == "__main__":
    sys.exit(main())
