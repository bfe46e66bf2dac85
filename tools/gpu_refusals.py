"""Engines that must not run: each is refused in one line, with exit status 2.

    python -m moecompiler.tools.gpu_refusals ROWS.json ENGINE_DIR

An engine directory of backend tensorrt is copied and damaged in several ways, and ``moecompiler run`` is asked to run each copy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moecompiler.atomic import write_json_atomic

_SECONDS = 100.0


@dataclass(frozen=True)
class Case:
    """``damage`` is done to a copy of the directory; the refusal has to say ``says``."""

    name: str
    damage: Callable[[Path], None]
    says: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What ``run`` did: its exit status and what it wrote to stderr."""

    case: str
    status: int
    stderr: str
    passed: bool


def flip_a_byte(path: Path) -> None:
    """In the middle of the file, whose size stays."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))


def cut_in_half(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def made_elsewhere(path: Path, **changes: Any) -> None:
    """The engine's record says that it was made with another TensorRT, or on another GPU; the file's size stays."""
    text = path.read_text()
    record = json.loads(text)
    record["made"] |= changes
    path.write_text(json.dumps(record, separators=(",", ":")).ljust(len(text)))


CASES = (
    Case("a byte of the plan is another", lambda folder: flip_a_byte(folder / "rank0.plan"), "rank0.plan"),
    Case("a byte of the weights is another", lambda folder: flip_a_byte(folder / "rank0.safetensors"), "safetensors"),
    Case(
        "made for another GPU",
        lambda folder: made_elsewhere(folder / "rank0.engine.json", sm=80, gpu="NVIDIA A100"),
        "SM 80",
        ("--no_check_hashes",),
    ),
    Case(
        "made by another TensorRT",
        lambda folder: made_elsewhere(folder / "rank0.engine.json", tensorrt="9.9.9"),
        "TensorRT 9.9.9",
        ("--no_check_hashes",),
    ),
    Case("half a plan", lambda folder: cut_in_half(folder / "rank0.plan"), "rank0.plan"),
    Case("no plan", lambda folder: (folder / "rank0.plan").unlink(), "rank0.plan"),
)


def attempt(case: Case, engine_dir: Path, copy: Path) -> Row:
    """Runs a damaged copy at ``copy``."""
    shutil.copytree(engine_dir, copy, ignore=shutil.ignore_patterns("export", "optimize", "*.onnx"))
    for source in engine_dir.glob("*.onnx"):  # large where nothing is bound, and never damaged here
        (copy / source.name).hardlink_to(source)
    case.damage(copy)
    what = ("--engine_dir", str(copy), "--max_output_len", "1", "--input_text", "def", *case.options)
    command = [sys.executable, "-m", "moecompiler.tools.main", "run", *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    return judge(case, done.returncode, done.stderr)


def judge(case: Case, status: int, stderr: str) -> Row:
    lines = [line for line in stderr.splitlines() if line.strip()]
    passed = status == 2 and len(lines) == 1 and lines[0].startswith("moecompiler: error:") and case.says in lines[0]
    return Row(case.name, status, stderr.strip(), passed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of all rows")
    parser.add_argument("engine_dir", type=Path)
    options = parser.parse_args(arguments)
    if not (options.engine_dir / "rank0.plan").is_file():
        parser.error(f"{options.engine_dir}: has no rank0.plan; give what compile --backend tensorrt wrote")
    rows = []
    with tempfile.TemporaryDirectory(dir=options.engine_dir.parent) as folder:
        for number, case in enumerate(CASES):
            rows.append(attempt(case, options.engine_dir, Path(folder) / str(number)))
            print(f"{'ok  ' if rows[-1].passed else 'FAIL'} {case.name}: status {rows[-1].status}: {rows[-1].stderr}")
    write_json_atomic(options.output, [asdict(row) for row in rows])
    print(f"{sum(row.passed for row in rows)} of {len(rows)} engines refused as they should be")
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
