"""Products of codes on SM 9.0: what a thread holds meets the columns that belong to it, and the kernels fit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted import interpret, interpreter

from moecompiler.plugins.hopper.compile import compile_image
from moecompiler.plugins.launch import AnyKernel, CudaKernel, Dims, Input, Launch, Output
from moecompiler.plugins.quantized.dequantize import Form
from moecompiler.plugins.quantized.grouped_codes import linear_tactics, moe_tactics, position_of
from moecompiler.plugins.quantized.moe_node import node_of
from moecompiler.quantization.schemes import Format

INT8, INT4 = Form(Format.INT8, False), Form(Format.INT4, True)


@pytest.mark.parametrize("two_in_a_byte", [False, True])
def test_columns_of_fragments(two_in_a_byte: bool) -> None:
    """As ``fragments.cuh`` loads and converts: of 64 columns, thread c of a quad delivers to product k, at the columns that PTX
    (``wgmma``, A in registers) gives it, the very ones that stand there among the tokens'."""
    delivered = {}
    for c in range(4):
        for chunk in range(2 if two_in_a_byte else 4):  # ldmatrix: bytes 4c to 4c + 3 of 16
            if two_in_a_byte:
                word = [32 * chunk + 8 * c + nibble for nibble in range(8)]
                pairs = [(2 * chunk + i // 2, i % 2, word[i], word[i + 4]) for i in range(4)]
            else:
                word = [16 * chunk + 4 * c + byte for byte in range(4)]
                pairs = [(chunk, i, word[2 * i], word[2 * i + 1]) for i in range(2)]
            for product, right, first, second in pairs:
                at = 16 * product + 8 * right + 2 * c
                delivered |= {at: first, at + 1: second}
    assert delivered == {position_of(column, two_in_a_byte): column for column in range(64)}


@pytest.mark.parametrize("two_in_a_byte", [False, True])
def test_where_the_up_product_writes(two_in_a_byte: bool) -> None:
    """``write_up``: of a warpgroup's 32 columns, warp w has 8."""
    for warp in range(4):
        for row in range(8):
            if two_in_a_byte:
                place = row % 4 * 8 + warp * 2 + row // 4
            else:
                place = warp // 2 * 16 + row // 2 % 2 * 8 + warp % 2 * 4 + row // 4 * 2 + row % 2
            assert place == position_of(8 * warp + row, two_in_a_byte)


class Arranging:
    """A plan of one launch of ``arrange_rows`` or ``arrange_sorted``."""

    name = "arranging"

    def __init__(self, kernel: AnyKernel, grid: tuple[int, int, int], args: tuple[int | Input | Output, ...]):
        self.kernels, self.grid, self.args = (kernel,), grid, args

    def workspace(self, dims: Dims) -> int:
        return 0

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        return (Launch(0, self.grid, self.args),)


@pytest.fixture(scope="module")
def interpreting() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as pool:
        yield pool


def without_overlap(kernel: AnyKernel) -> AnyKernel:
    return replace(kernel, constants=tuple((k, v if k != "OVERLAPPED" else False) for k, v in kernel.constants))


@pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])
def test_arranged_tokens(interpreting: ProcessPoolExecutor, form: Form) -> None:
    x = torch.arange(3 * 192).reshape(3, 192).half()
    order = [position_of(column, form is INT4) for column in range(192)]
    want = torch.empty_like(x)
    want[:, order] = x
    rows = without_overlap(linear_tactics(form, 64 if form is INT4 else 0, 8, 192, "float16", 90)[0].kernels[0])
    outputs = [torch.full_like(x, float("nan")), torch.zeros(1, dtype=torch.int32)]
    plan = Arranging(rows, (3, 1, 1), (Input(0), Output(0), Output(1), 3))
    got, totals = interpreting.submit(interpret, "", {}, "float16", [x], outputs, plan).result()
    assert torch.equal(got, want)
    assert totals.tolist() == [3]
    node = node_of(*node_args(form, 192, 64))
    assert node is not None
    kernel = next(k for k in moe_tactics(node)[0].kernels if k.function == "arrange_sorted")
    places = torch.tensor([[4, 0], [-1, 2], [1, 3]], dtype=torch.int32)
    plan = Arranging(without_overlap(kernel), (3, 1, 1), (Input(0), Input(1), Output(0)))
    empty = torch.full((5, 192), float("nan"), dtype=torch.float16)
    (moved,) = interpreting.submit(interpret, "", {}, "float16", [x, places], [empty], plan).result()
    assert torch.equal(moved, want[[0, 2, 1, 2, 0]])


def node_args(form: Form, hidden: int, block: int, dtype: str = "float16", sm: int = 90) -> tuple[Any, ...]:
    """Of ``node_of``."""
    intermediate, attributes = 2 * hidden, {"top_k": 2, "normalization_mode": 1, "block_size": block}
    parts = 3 if form.asymmetric or form.two_level else 2
    dims = [(-1, hidden), (8, hidden), *[(8 * 2 * intermediate, 1)] * parts, *[(8 * hidden, 1)] * parts, (8,)]
    return f"MoE{form.name}", attributes, tuple(dims), dtype, sm


def test_nodes_without_kernels() -> None:
    """Other cards, columns that are no multiple of 64, blocks that divide no 64 columns."""
    for form, hidden, block, sm in ((INT8, 192, 0, 80), (INT8, 96, 0, 90), (INT4, 192, 32, 90), (INT4, 192, 96, 90)):
        node = node_of(*node_args(form, hidden, block, sm=sm))
        assert node is None or not moe_tactics(node)
    assert not linear_tactics(INT8, 0, 12, 64, "float16", 90)


@pytest.mark.parametrize(("form", "block"), [(INT8, 0), (Form(Format.UINT4, True), 128)], ids=["int8", "asymmetric"])
def test_kernels_compile(monkeypatch: pytest.MonkeyPatch, form: Form, block: int) -> None:
    """Without spills, and no product waits for another's registers."""
    monkeypatch.setenv("CUDA_CACHE_DISABLE", "1")  # the assembler says nothing of a kernel that NVRTC finds there
    kernel = linear_tactics(form, block, 4096, 4096, "bfloat16", 90)[0].kernels[1]
    assert isinstance(kernel, CudaKernel)
    _, log = compile_image(kernel, 90)
    assert "0 bytes spill stores" in log, log
    assert "serialized" not in log, log
