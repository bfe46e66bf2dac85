"""What of the kernels' benchmarks can be tested without a GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moecompiler.plugins.tactics import tactics
from moecompiler.tools import bench_attention, bench_moe, bench_sampling
from moecompiler.tools.kernel_timing import relative_error


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
