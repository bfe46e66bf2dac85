"""All that needs a GPU and TensorRT, in one go: tests, engines of the shipped model, figures of a layer of 8x7b's size.

    python tools/gpu_check.py --output_dir DIR [--only NAME[,NAME]] [--skip NAME[,NAME]]

Goes on after a failure; prints a line per step; ``DIR/summary.json`` has them all, ``DIR/NAME.log`` what a step said.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "--tb=short")
_OURS = (sys.executable, "-m", "moecompiler.tools.main")
_LAYERS = 2  # of 8x7b: 5.6 GB of experts


@dataclass(frozen=True)
class Step:
    """``command`` gets the output directory for ``{}``; ``seconds`` at most."""

    name: str
    command: tuple[str, ...]
    seconds: int = 240


@dataclass(frozen=True)
class Outcome:
    name: str
    status: int
    seconds: float
    last: str


def steps() -> list[Step]:
    """In the order of what depends on what."""
    compile_8x7b = (*_OURS, "compile", "--model", "8x7b", "--num_layers", str(_LAYERS), "--dtype", "float16")
    limits = ("--backend", "tensorrt", "--pipeline", "plugins", "--max_seq_len", "512", "--max_input_len", "256")
    found = [
        Step("versions", (sys.executable, "-c", _VERSIONS), 60),
        Step("ops", (*_PYTEST, "tests/gpu/test_tensorrt_ops.py")),
        Step("model", (*_PYTEST, "tests/gpu/test_tensorrt_model.py")),
        Step("moe", (sys.executable, "-m", "moecompiler.tools.bench_engine_moe", "--json", "{}/moe.json")),
    ]
    for kind in ("on", "off"):
        engine = ("--output_dir", f"/tmp/8x7b-{kind}", "--plugins", kind, "--max_batch_size", "1")
        found.append(Step(f"build-{kind}", (*compile_8x7b, *limits, *engine)))
        sizes = ("--batch_size", "1", "--input_len", "128", "--output_len", "64", "--no_check_hashes")
        bench = ("bench", "--engine_dir", f"/tmp/8x7b-{kind}", *sizes, "--output_json", f"{{}}/bench-{kind}.json")
        found.append(Step(f"bench-{kind}", (*_OURS, *bench)))
    return found


_VERSIONS = """
import numpy, onnx, torch, triton, cuda.bindings, tensorrt
from moecompiler.runtime.device import Device
print(Device().info(), "tensorrt", tensorrt.__version__, "numpy", numpy.__version__, "torch", torch.__version__, "triton",
      triton.__version__, "cuda-bindings", cuda.bindings.__version__, "onnx", onnx.__version__)
"""


def run(step: Step, output_dir: Path) -> Outcome:
    begin = time.monotonic()
    command = [word.replace("{}", str(output_dir)) for word in step.command]
    with (output_dir / f"{step.name}.log").open("w") as log:
        try:
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=step.seconds).returncode
        except subprocess.TimeoutExpired:
            status = 124
    lines = (output_dir / f"{step.name}.log").read_text(errors="replace").strip().splitlines()
    return Outcome(step.name, status, time.monotonic() - begin, lines[-1] if lines else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--only", default="", help="names of steps")
    parser.add_argument("--skip", default="", help="names of steps")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for step in steps():
        if (options.only and step.name not in options.only.split(",")) or step.name in options.skip.split(","):
            continue
        outcomes.append(run(step, options.output_dir))
        last = outcomes[-1]
        print(f"{'ok  ' if last.status == 0 else 'FAIL'} {last.name} {last.seconds:.0f} s: {last.last}", flush=True)
    summary: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    summary |= {"steps": [asdict(each) for each in outcomes]}
    (options.output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(each.status for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
