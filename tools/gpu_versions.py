"""The GPU and the versions of what is used on it; ends with status 1 where something that is needed is missing.

python -m moecompiler.tools.gpu_versions VERSIONS.json
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from moecompiler.atomic import write_json_atomic

NEEDED = (
    "numpy",
    "ml_dtypes",
    "onnx",
    "onnx_graphsurgeon",
    "onnxscript",
    "onnxruntime",
    "polygraphy",
    "tokenizers",
    "transformers",
    "typer",
    "rich",
    "pytest",
    "pytest_timeout",
    "torch",
    "triton",
    "cuda.bindings",
    "tensorrt",
)
OTHERS = ("onnxruntime_extensions", "mpi4py", "psutil", "xdist")  # for engines of ONNX Runtime, mpirun, other tests


def versions(names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The versions of modules, and of those that cannot be imported why."""
    found, missing = {}, {}
    for name in names:
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "?"))
        except Exception as error:  # a library of C++ may fail in any way
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="JSON of what was found")
    options = parser.parse_args(arguments)
    found, missing = versions((*NEEDED, *OTHERS))
    data: dict[str, object] = {"python": sys.version.split()[0], "versions": found, "missing": missing}
    if "cuda.bindings" in found:
        from dataclasses import asdict

        from moecompiler.errors import UserError
        from moecompiler.runtime.device import Device

        try:
            data["gpu"] = asdict(Device().info())
        except UserError as error:
            missing["gpu"] = str(error)
    write_json_atomic(options.output, data)
    print(f"{data.get('gpu')} {', '.join(f'{name} {version}' for name, version in found.items())}")
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    return int(any(name not in OTHERS for name in missing))


if __name__ == "__main__":
    sys.exit(main())
