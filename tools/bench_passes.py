"""Time and peak memory of passes and of what looks into them, each in a process of its own, as users call them.

    python tools/bench_passes.py --output build/bench-passes

prints a row for each command and writes ``passes.json``. Nothing is read but the shipped model; the large ones are dummies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "tests" / "data" / "tiny-mixtral"
MAPPINGS = {
    "tp8": ("--tp_size", "8"),
    "ep8": ("--tp_size", "8", "--moe_ep_size", "8"),
    "tp4·ep2·pp2": ("--tp_size", "8", "--moe_tp_size", "4", "--moe_ep_size", "2", "--pp_size", "2"),
}


@dataclass(frozen=True)
class Row:
    """A command: wall time in seconds, the largest resident set of its process in MiB, its exit status."""

    what: str
    seconds: float
    peak_mib: float
    status: int


def run(what: str, *arguments: object) -> Row:
    """Runs ``moecompiler`` with these arguments; what it prints goes to stderr."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "moecompiler.tools.main", *map(str, arguments)]
    pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(pid, 0)
    row = Row(what, time.perf_counter() - started, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status))
    print(f"{row.what:58} {row.seconds:7.1f} s {row.peak_mib:8.0f} MiB   exit {row.status}", flush=True)
    return row


def measure(output: Path) -> list[Row]:
    """Every row; what the commands write goes to ``output``."""
    rows = []
    for name, mapping in MAPPINGS.items():
        exported, optimized = output / f"8x22b-{name}" / "export", output / f"8x22b-{name}" / "optimize"
        rows.append(
            run(f"8x22b {name}: export", "export", "--model", "8x22b", *mapping, "--rank", 0, "--output_dir", exported)
        )
        given: tuple[object, ...] = ("--checkpoint_dir", exported, "--output_dir", optimized, "--rank", 0)
        rows.append(run(f"8x22b {name}: optimize, plugins", "optimize", *given, "--pipeline", "plugins"))
    exported = output / "8x7b" / "export"
    run("8x7b, 2 layers: export", "export", "--model", "8x7b", "--num_layers", 2, "--output_dir", exported)
    plugins = ("--pipeline", "plugins")
    report = output / "8x7b.html"
    rows.append(
        run("8x7b, 2 layers: report", "passes", "report", exported, "--output", report, "--no_verify", *plugins)
    )
    exported = output / "shipped" / "export"
    ep2 = ("--tp_size", 2, "--moe_ep_size", 2, "--max_seq_len", 128)
    run("shipped, ep2: export", "export", "--model_dir", SHIPPED, *ep2, "--output_dir", exported)
    given = ("--checkpoint_dir", exported, "--output_dir", output / "shipped" / "optimize")
    rows.append(run("shipped, ep2: optimize, plugins, all dumps", "optimize", *given, *plugins, "--dump_passes"))
    rows.append(run("shipped, ep2: passes verify", "passes", "verify", exported, *plugins))
    rows.append(
        run("shipped, ep2: passes report", "passes", "report", exported, "--output", output / "shipped.html", *plugins)
    )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("build/bench-passes"), help="Where results go; it is emptied."
    )
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    rows = measure(arguments.output)
    machine = {
        "date": date.today().isoformat(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("onnx", "onnx-graphsurgeon", "onnxruntime", "torch", "transformers")
        },
    }
    result = {"machine": machine, "rows": [asdict(row) for row in rows]}
    (arguments.output / "passes.json").write_text(json.dumps(result, indent=2) + "\n")
    return max(row.status for row in rows)


if __name__ == "__main__":
    sys.exit(main())
