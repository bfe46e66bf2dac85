"""How good the trained model is when it is quantized; the table of docs/quantization.md is of more text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fp8 import calibrated
from programs import GRID, TINY_MIXTRAL, Programs, Subject

from moecompiler.backends.onnxruntime_program import WeightCache
from moecompiler.config import ExportOptions
from moecompiler.errors import UserError
from moecompiler.tools.bench_quantized import FORMATS, Text, read_text, rows_of, table, with_static_scales
from moecompiler.validation.difference import log_softmax

LENGTH = 256
# format → bounds: more perplexity, KL, top-1, other experts
BOUNDS = {
    "float32": (1e-5, 1e-8, 1.0, 0.0),
    "int8": (0.005, 2e-3, 0.98, 0.02),
    "fp8": (0.01, 2e-2, 0.95, 0.05),
    "nvfp4": (0.06, 0.06, 0.88, 0.12),
    "int4, groups of 64": (0.04, 0.1, 0.85, 0.15),
}


def test_formats(shipped: Subject, programs: Programs) -> None:
    tokens = read_text(TINY_MIXTRAL, TINY_MIXTRAL / "heldout.txt", shipped.config.vocab_size, 8, LENGTH)
    with torch.inference_mode():
        expected = np.concatenate(
            [log_softmax(shipped.hf(torch.from_numpy(row[None])).logits.numpy()) for row in tokens]
        )
    options = ExportOptions("float32", max_seq_len=LENGTH, all_logits=True)
    exported = programs.exported(shipped.config, GRID["one-rank"], 0, options)
    every = FORMATS | with_static_scales(shipped.config, calibrated(shipped))
    formats = {name: every[name] for name in BOUNDS}
    rows = rows_of(exported, WeightCache(shipped.reader), Text(tokens, expected), formats)
    assert table(rows).count("\n") == len(rows) + 1
    for row, (increase, kl, top1, experts) in zip(rows, BOUNDS.values(), strict=True):
        assert abs(row.increase) < increase, row
        assert row.kl < kl, row
        assert row.top1 >= top1, row
        assert row.other_experts <= experts, row
    sizes = {row.format: row.weight_bytes for row in rows}
    assert sizes["float32"] > 2.5 * sizes["int8"] > 3.5 * sizes["int4, groups of 64"]
    assert abs(sizes["fp8"] / sizes["int8"] - 1) < 1e-3
    assert [row.kl for row in rows] == sorted(row.kl for row in rows)


def test_too_little_text(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("def")
    with pytest.raises(UserError, match="fewer than one window of 256"):
        read_text(TINY_MIXTRAL, path, 1536, 4, LENGTH)
