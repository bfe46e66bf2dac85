"""Tables of what was found on a GPU: from the very rows that the scripts write."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moecompiler.tools import (
    bench_attention,
    bench_engine_build,
    bench_engine_decode,
    bench_engine_overhead,
    bench_moe,
    bench_quantized_engines,
    bench_quantized_linear,
    bench_quantized_moe,
    compare_text,
    gpu_refusals,
    gpu_soak,
)
from moecompiler.tools.bench import Figures
from moecompiler.tools.gpu_check import summary
from moecompiler.tools.gpu_report import SECTIONS, main, report
from moecompiler.tools.gpu_schedule import FAILED, OK, Outcome
from moecompiler.validation.quality import Quality
from moecompiler.validation.runners import OutputReport
from moecompiler.validation.tolerances import TOLERANCES
from moecompiler.validation.validate import Report

SUMMARY = summary([Outcome("a", OK, 0, 1.0, ""), Outcome("kernels", FAILED, 1, 2.0, "1 failed")], 61.0)
OUTPUT = OutputReport(0, "text", "logits", 0.011, 0.0022, True)
QUALITY = Quality("text", 400, 0.017, 2e-6, 0.995, 5.461, 5.459, True)
VALIDATED = Report(TOLERANCES["float16"], (OUTPUT,), (), (QUALITY,))
STEP = Figures(1, 128, 65, 0.0123, 0.000845, 0.00085, 1183.0, 900.0)


def rows(*found: Any) -> dict[str, Any]:
    return {"rows": [asdict(row) for row in found]}


def figures() -> dict[str, Any]:
    """One of each."""
    decoded = bench_engine_decode.Row("decode-on", 4, "float16", asdict(STEP), 3.4e9, 744.0, 845.0, 0.88, 4.59e12)
    built = bench_engine_build.Row(
        "8x7b", 32, "float16", 300, 97, {"plan": 91.0}, 99.0, 222.0, 3 << 30, 1, 90 << 30, 1, 9 << 30
    )
    return {
        "versions": {
            "python": "3.12.3",
            "versions": {"tensorrt": "10.6.0"},
            "gpu": {"name": "NVIDIA H200", "driver": "13.0"},
        },
        "validate-float16-on-tp2": VALIDATED.to_json(),
        "validate-cut": None,
        "text-float16-on-tp2": rows(compare_text.Row(0, 5, 57, 64, 0.0028, 0.0051, 0.0014, 0.0072, True)),
        "soak": asdict(gpu_soak.Result(2000, 520, 504, 12.0, 70_000, 70_000, 70_000, 51, 0)),
        "refusals": [asdict(gpu_refusals.Row("half a plan", 2, "moecompiler: error: no", True))],
        "moe": rows(
            bench_moe.Row("8x7b", 64, "float16", "engine, on", 8.0, 646.1, 614.0, "bytes", 0.95, 9.0, 1e-3, 4e12, 7e14)
        ),
        "attention": rows(
            bench_attention.Row("4 × 1 new", "float16", "engine, on", 9.5, 7.3, 0.77, 3.0, 1e-3, 4e12, 7e14)
        ),
        "decode-on": rows(decoded),
        "overhead": rows(bench_engine_overhead.Row("on", "float16", 40, 100.0, 204.0, 2.6, 1e-3)),
        "build": rows(built),
        "shipped-on": {"figures": [asdict(STEP)]},
        "q-text-fp8": {
            "rows": [
                asdict(
                    bench_quantized_engines.Row(
                        f"q-fp8-{plugins}", "fp8", "float16", "tensorrt", count, 600, 4.981, 4.929, 0.0106, 6e-3, 0.961
                    )
                )
                for plugins, count in (("on", 17), ("off", 0))
            ],
            "pairs": [asdict(bench_quantized_engines.Pair("q-fp8", 2e-3, 0.99, 1e-3, False))],
        },
        "q-moe": rows(
            bench_quantized_moe.Row(
                *("8x7b", "int4", 128, "float16", 4, "few", 5.2, 170.4, 140.2, 0.823, 430.0, 2.52, 4e-4, 3e12)
            )
        ),
        "q-linear": rows(
            bench_quantized_linear.Row(
                *("qkv", "Int8", "float16", 1, "few", 11.1, 8.5, "bytes", 0.766, 18.3, 1.65, 2e-4)
            )
        ),
        "q-attention": rows(
            bench_attention.Row("1 × 1 new, fp8", "float16", "few", 8.5, 6.3, 0.74, 2.0, 1e-3, 4e12, 7e14),
            bench_attention.Row("1 × 1 new", "float16", "cuDNN", 8.7, 6.3, 0.72, 2.0, None, 4e12, 7e14),
        ),
    }


def test_every_section_shows_its_figures() -> None:
    page = report(SUMMARY, figures())
    for title, _, _ in SECTIONS:
        assert f"## {title}\n" in page
    for text in (
        "NVIDIA H200, driver of CUDA 13.0, Python 3.12.3, tensorrt 10.6.0.",
        "1 failed, 1 ok, 61 s in all",
        "| kernels | failed | 1 failed |",
        "| float16-on-tp2 | 1.1e-02 | 2.2e-03 | 0.02 | 2.0e-06 | 99.5% | 5.461 (5.459) | ok |",
        "| float16-on-tp2 | 0 of 1 | 0.0028 (0.0014) |  |",
        "| 8x7b | float16 | engine, on | 64 | 8.0 | 646.1 | 614.0 (bytes) | 95.0% | 9 | 1e-03 |",
        "| on | 4 | 845 | 744 | 88.0% | 4.59 | 12.30 |",
        "| on | float16 | 40 | 100.0 | 204.0 | 2.60 |",
        "| 32 | float16 | plan 91 | 222 | 3.22 GB | 0.0 of 96.6 GB | 9.0 GiB |",
        "| on | 1 | 128 | 65 | 12.30 | 845 | 850 | 1183 |",
        "| q-fp8-on | fp8 | 17 | 4.9810 | +1.06% | 6.0e-03 | 96.1% | 2.0e-03 **too far** |",
        "| q-fp8-off | fp8 | 0 | 4.9810 | +1.06% | 6.0e-03 | 96.1% |  |",
        "| 8x7b | int4 128 | float16 | few | 4 | 5.2 | 170.4 | 140.2 | 82.3% | 430.0 | 2.52 | 4e-04 |",
        "| qkv | Int8 | float16 | few | 1 | 11.1 | 8.5 (bytes) | 76.6% | 18.3 | 1.65 | 2e-04 |",
        "| 1 × 1 new, fp8 | float16 | few | 8.5 | 6.3 | 74.0% | 2 | 1e-03 |",
    ):
        assert text in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in lines)


def test_what_was_not_run_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "figures.json").write_text(json.dumps({"soak": figures()["soak"]}))
    main([str(tmp_path)])
    page = capsys.readouterr().out
    assert [line for line in page.splitlines() if line.startswith("## ")] == [f"## {SECTIONS[2][0]}"]


def test_no_such_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2
    assert "summary.json" in capsys.readouterr().err
