"""What of the kernels' benchmarks can be tested without a GPU."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moecompiler.plugins.tactics import tactics
from moecompiler.tools import bench_attention, bench_moe, bench_quantized_moe, bench_sampling
from moecompiler.tools.kernel_timing import relative_error
from moecompiler.tools.quantized_layers import QuantizedLayer


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.parametrize("benchmark", [bench_moe, bench_attention, bench_sampling])
def test_without_a_gpu_a_benchmark_says_so(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main([str(tmp_path / "rows.json")])
    assert end.value.code == 2
    assert "there is none here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_layer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench_moe.main([str(tmp_path / "rows.json"), "--layers", "9x9b"])
    assert end.value.code == 2
    assert "9x9b" in capsys.readouterr().err


@pytest.mark.parametrize("case", bench_attention.CASES, ids=str)
def test_cases_are_what_the_op_takes(case: bench_attention.Case) -> None:
    (tactic, *_) = tactics("Attention", case.attributes, case.dims, "float16", 90)
    assert tactic.launches(case.dims)
    assert case.past + case.new <= case.slots
    size = 4 * math.prod(case.dims[6])
    assert bench_attention.copies(case) * size > 100_000_000 or bench_attention.copies(case) == 40


def test_relative_error() -> None:
    one = torch.ones(4)
    assert relative_error(1.5 * one, one) == 0.5
    assert relative_error(0 * one, 0 * one) == 0
    assert relative_error(one, 0 * one) == 2
    assert math.isnan(relative_error(one / 0 - one / 0, one))


def test_what_is_slower_than_floats_is_said() -> None:
    row = bench_quantized_moe.Row("8x7b", "int4", 128, "float16", 64, "narrow", 8, 90, 50, 0.5, 100, 1.1, 1e-3, 3e12)
    slow = dataclasses.replace(row, tactic="early", microseconds=125, speedup=0.8)
    assert bench_quantized_moe.slower_than_float([row, slow]) == []  # one tactic is enough
    lines = bench_quantized_moe.slower_than_float([slow, dataclasses.replace(slow, format="fp8", speedup=0)])
    assert lines == ["8x7b int4: slower than floats at 64 tokens (0.80x)"]


def test_floors_are_of_codes_and_scales() -> None:
    """Bytes of an expert: of each format, by its definition; 3 matrices of 64 by 128."""
    sizes = {"Int8": 64 * 128 * 3 + 2 * (256 + 64), "Int4": 64 * 128 * 3 // 2 * (1 + 2 / 32), "Nvfp4": 13824 + 4 * 320}
    for kind, size in sizes.items():
        layer = QuantizedLayer(kind, 64, 128, {"Int4": 64, "Nvfp4": 16}.get(kind, 0), (0, 1), device="cpu")
        assert layer.expert_nbytes == size
