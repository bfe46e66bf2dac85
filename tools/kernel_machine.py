"""What the kernels' benchmarks share beside timing: their command line, what they ran on, and the file they write."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moecompiler.atomic import write_json_atomic

DTYPES = ("float16", "bfloat16")


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("output", type=Path, help="JSON of all rows")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float16"])
    return parser


def parse_for_gpu(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Ends with a line and status 2 where an option is wrong or there is no GPU."""
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this measures a CUDA GPU, and there is none here")
    return options


def machine() -> dict[str, str]:
    """Device, versions and date."""
    import triton
    from cuda.bindings import driver

    from moecompiler.plugins.driver import check

    version = check(*driver.cuDriverGetVersion())
    return {
        "device": torch.cuda.get_device_name(),
        "driver": f"CUDA {version // 1000}.{version % 1000 // 10}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Writes rows, which are dataclasses, and the machine."""
    write_json_atomic(path, {"machine": machine(), "rows": [asdict(row) for row in rows]})
