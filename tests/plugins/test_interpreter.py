"""Triton's interpreter as a piece of the product: its bfloat16, its plans, its processes."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import interpret
from opmodels import run_op

from moecompiler.backends.interpreted_node import InterpretedNode
from moecompiler.errors import UserError
from moecompiler.plugins.attention.op import ATTENTION
from moecompiler.plugins.interpreted_tactics import interpreted_tactics
from moecompiler.plugins.interpreter import interpret as interpret_node
from moecompiler.plugins.interpreter import shared_pool
from moecompiler.plugins.quantized.dequantize import forms
from moecompiler.plugins.tactics import tactics
from moecompiler.tools.quantized_layers import QuantizedLayer


@pytest.fixture
def interpreting() -> ProcessPoolExecutor:
    return shared_pool()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def empty(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, float("nan"))


def test_bfloat16_bit_by_bit(interpreting: ProcessPoolExecutor) -> None:
    """Products of bfloat16, and roundings to it that carry into the exponent."""
    torch.manual_seed(0)
    x, weight = (10 * torch.randn(40, 64)).bfloat16(), torch.randn(64).bfloat16()
    x[0] = 1.9921875  # the largest below 2: its norm's numbers round up to 1
    wide = x.float()
    normal = (wide * (1.0 / torch.sqrt((wide * wide).sum(-1, keepdim=True) / 64 + 1e-5))).bfloat16()
    task = interpreting.submit(interpret, "RMSNorm", {"epsilon": 1e-5}, "bfloat16", [x, weight], [empty(x)])
    (got,) = task.result()
    # sums in another order are rounded otherwise now and then, by one unit in the last place
    steps = (got.view(torch.int16).int() - (weight * normal).view(torch.int16).int()).abs()
    assert steps.max() <= 1
    assert (steps == 0).float().mean() > 0.99
    assert torch.equal(got[0], weight)


def test_bfloat16_attention(interpreting: ProcessPoolExecutor) -> None:
    """Products of matrices of it; against the body in float32."""
    torch.manual_seed(0)
    rows = [torch.randn(2, 9, n * 32).bfloat16() for n in (4, 2, 2)]
    angles = torch.randn(2, 1, 9, 32)
    positions, cache = torch.tensor([0, 5])[:, None] + torch.arange(9), torch.randn(2, 2, 2, 40, 32).bfloat16()
    inputs = [*rows, angles.cos().bfloat16(), angles.sin().bfloat16(), positions, *(each.clone() for each in cache)]
    attributes = {"num_heads": 4, "num_kv_heads": 2, "scale": 32**-0.5, "window": 0}
    wide = [each.float() if each.is_floating_point() else each for each in inputs]
    want = run_op(ATTENTION, attributes, *wide)
    outputs = [empty(rows[0]), 6, 7]
    got = interpreting.submit(interpret, "Attention", attributes, "bfloat16", inputs, outputs).result()
    for mine, theirs in zip(got, want, strict=True):
        assert relative_error(mine, torch.from_numpy(theirs)) < 5e-3


FORM = next(form for form in forms() if form.name == "Int4")


def moe() -> tuple[str, dict[str, Any], list[torch.Tensor], torch.Tensor, tuple[tuple[int, ...], ...]]:
    torch.manual_seed(0)
    x, router = torch.randn(1, 40).half(), torch.randn(8, 40).half()
    weights = torch.randn(8, 144, 40).half(), torch.randn(8, 40, 72).half()
    inputs = [x, router, *weights, torch.arange(8)]
    return "MoE", {"top_k": 2, "normalization_mode": 1}, inputs, x, tuple(tuple(each.shape) for each in inputs)


def quantized_moe() -> tuple[str, dict[str, Any], list[torch.Tensor], torch.Tensor, tuple[tuple[int, ...], ...]]:
    torch.manual_seed(0)
    layer, x = QuantizedLayer("Int4", 64, 96, 32, (0, 1, 2, 3), 4, 2, device="cpu"), torch.randn(1, 64).half()
    attributes = {"top_k": 2, "normalization_mode": 1, "block_size": 32}
    return "MoEInt4", attributes, layer.inputs(x), x, layer.dims(1)


@pytest.mark.parametrize("make", [moe, quantized_moe])
def test_more_rows_a_program(make: Any, interpreting: ProcessPoolExecutor) -> None:
    """Plans that are interpreted give the very bits of those for a GPU, in fewer programs."""
    op, attributes, inputs, x, dims = make()
    plans = tactics(op, attributes, dims, "float16", 80)[0], interpreted_tactics(op, attributes, dims, "float16")[0]
    programs = [sum(np.prod(launch.grid) for launch in plan.launches(dims)) for plan in plans]
    assert programs[1] < programs[0] / 4
    results = [
        interpreting.submit(interpret, op, attributes, "float16", inputs, [empty(x)], plan, dims).result()[0]
        for plan in plans
    ]
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_beside_its_tensors() -> None:
    """Where a kernel leaves its tensors, it is stopped there: a plan for twice the heads that there are."""
    attributes = {"num_heads": 8, "num_kv_heads": 2, "scale": 1.0, "window": 0}
    node = InterpretedNode("n", "Attention", attributes, "float16", "tiled").to_json()
    rows = [np.zeros((1, 1, size), np.float32) for size in (64, 32, 32)]
    angles, cache = np.zeros((1, 1, 1, 16), np.float32), np.zeros((1, 2, 8, 16), np.float32)
    with pytest.raises(
        UserError, match=r"^n: .* Attention \(tactic tiled\) failed: IndexError: a kernel (reads|writes) beside"
    ):
        interpret_node(node, "", [*rows, angles, angles, np.zeros((1, 1), np.float32), cache, cache])


def test_a_process_that_dies() -> None:
    """Is said in one line; the next call has another one."""
    node = InterpretedNode("n", "RMSNorm", {"epsilon": 1e-5}, "float32", "rows").to_json()
    arrays = [np.full((2, 16), 3.0, np.float32), np.ones(16, np.float32)]
    with pytest.raises(BrokenProcessPool):
        shared_pool().submit(os._exit, 3).result()
    failed = r"^n: interpreting the kernels of plugin RMSNorm \(tactic rows\) failed: "
    with pytest.raises(UserError, match=f"{failed}the process died"):
        interpret_node(node, "", arrays)
    (got,) = interpret_node(node, "", arrays)
    np.testing.assert_allclose(got, 1.0, rtol=1e-5)
    with pytest.raises(UserError, match=f"{failed}ValueError: RMSNorm: hidden of weight is 8, elsewhere 16"):
        interpret_node(node, "", [arrays[0], arrays[1][:8]])
