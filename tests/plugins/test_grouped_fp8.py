"""Plans of FP8 products with many rows: Triton's part interpreted, CUDA C++ by torch on what tensor maps show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from interpreted import interpreter
from test_compile import assert_fits, fresh_cache  # noqa: F401

from moecompiler.plugins.interpreted import run_launch
from moecompiler.plugins.launch import CudaKernel, Dims, Input, Launch, Output, Tactic, TensorMap, Workspace
from moecompiler.plugins.moe.tiles import Sizes
from moecompiler.plugins.quantized.grouped_fp8 import linear_tactics, moe_tactics
from moecompiler.tools.kernel_timing import relative_error
from moecompiler.tools.quantized_layers import QuantizedLayer


@pytest.fixture(scope="module")
def interpreting() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as pool:
        yield pool


def e4m3(codes: torch.Tensor) -> torch.Tensor:
    return codes.contiguous().view(torch.float8_e4m3fn).float()


class Memory:
    """What a launch's arguments point to."""

    def __init__(self, inputs: Sequence[torch.Tensor], output: torch.Tensor, workspace: torch.Tensor):
        self.inputs, self.output, self.workspace = inputs, output, workspace

    def at(self, where: object, dtype: torch.dtype) -> torch.Tensor:
        match where:
            case Input(index):
                return self.inputs[index].flatten().view(dtype)
            case Output(_):
                return self.output.flatten()
            case Workspace(offset):
                return self.workspace[offset : offset + (len(self.workspace) - offset) // 16 * 16].view(dtype)
        raise AssertionError(where)

    def box(self, view: object) -> torch.Tensor:
        """A tensor map's numbers, in its own axes."""
        assert isinstance(view, TensorMap)
        assert (view.dtype, view.box[-1], math.prod(view.box) % 4096) == ("int8", 128, 0)
        assert all(stride % 16 == 0 for stride in view.strides)
        codes = self.at(view.base, torch.int8)
        return e4m3(torch.as_strided(codes, view.sizes, (*view.strides, 1)))


def stand_in(kernel: CudaKernel, launch: Launch, memory: Memory, dtype: torch.dtype) -> None:
    """What ``grouped_fp8.cu`` says of its kernels."""
    constants, names = dict(kernel.constants), [name for name, _ in kernel.signature]
    args = dict(zip(names, launch.args, strict=True))
    assert launch.persistent
    assert isinstance(constants["LOCAL"], int)
    weights, tokens = memory.box(args["weights"]), memory.box(args["tokens"])
    up = kernel.function == "grouped_fp8_up"
    local, rows, columns = (
        constants["LOCAL"],
        weights.numel() // (constants["LOCAL"] * weights.shape[-1]),
        weights.shape[-1],
    )
    totals = memory.at(args["totals"], torch.int32)[:local].tolist()
    scales = memory.at(args["scales"], dtype)[: local * rows].float().view(local, rows)
    input_scales = memory.at(args["input_scales"], dtype)[:local].float()
    assert (columns, rows) == (
        (constants["HIDDEN"], 2 * constants["INTERMEDIATE"]) if up else (constants["INTERMEDIATE"], constants["HIDDEN"])
    )
    first = 0
    for e, count in enumerate(totals):
        x = tokens[first : first + count] * input_scales[e]
        if up:
            output_scale = memory.at(args["output_scales"], dtype)[e].float()
            gate, value = (weights[e, :, i].reshape(-1, columns) for i in (0, 1))
            gate_scales, value_scales = scales[e].chunk(2)
            inner = torch.nn.functional.silu(x @ gate.T * gate_scales) * (x @ value.T * value_scales)
            codes = (inner.to(dtype).float() / output_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            width = rows // 2
            memory.at(args["inner"], torch.int8)[first * width : (first + count) * width] = codes.view(
                torch.int8
            ).flatten()
        else:
            result = (x @ weights[e].T * scales[e]).to(dtype).flatten()
            memory.at(args[names[-1]], dtype)[first * rows : (first + count) * rows] = result
        first += count


def run(tactic: Tactic, inputs: list[torch.Tensor], output: torch.Tensor, dims: Dims) -> torch.Tensor:
    """In the interpreter's process."""
    workspace = torch.full((tactic.workspace(dims) + 16,), 0x7F, dtype=torch.uint8)
    addresses = [each.data_ptr() for each in inputs], [output.data_ptr()], workspace.data_ptr()
    for launch in tactic.launches(dims):
        kernel = tactic.kernels[launch.kernel]
        if isinstance(kernel, CudaKernel):
            stand_in(kernel, launch, Memory(inputs, output, workspace), output.dtype)
        else:
            run_launch(kernel, launch, *addresses)
    return output


@pytest.mark.parametrize(
    ("tokens", "top_k", "expert_ids"), [(3, 2, range(5)), (17, 1, (4, 0)), (37, 3, range(5)), (1, 2, (3, 1, 2))]
)
def test_moe(interpreting: ProcessPoolExecutor, tokens: int, top_k: int, expert_ids: Sequence[int]) -> None:
    """All experts or some, in any order; inputs beyond their scales; rows that are no multiple of a step."""
    layer = QuantizedLayer("Fp8", 144, 80, 0, tuple(expert_ids), 5, top_k, device="cpu")
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 144).half()
    inputs, dims = layer.inputs(x), layer.dims(tokens)
    sizes = Sizes(144, 80, 5, len(expert_ids), top_k, 1)
    for tactic in moe_tactics(sizes, "float16", 90)[:1]:
        output = torch.full_like(x, math.nan)
        got = interpreting.submit(run, tactic, inputs, output, dims).result()
        assert relative_error(got, layer.expected(x)) < 2e-3


def test_linear(interpreting: ProcessPoolExecutor) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 2064)).half()
    codes = torch.randn(48, 2064).to(torch.float8_e4m3fn)
    scales, input_scale = (0.01 + torch.rand(48) / 50).half(), torch.tensor([0.02]).half()
    inputs = [x, codes.view(torch.int8), scales, input_scale]
    plain, promoted = linear_tactics(48, 2064, "float16", 90)
    assert plain.launches(((2, 5, 2064),)) == promoted.launches(((2, 5, 2064),))
    output = torch.full((2, 5, 48), math.nan, dtype=torch.float16)
    got = interpreting.submit(run, plain, inputs, output, tuple(tuple(each.shape) for each in inputs)).result()
    quotients = (x.float() / input_scale.float()).clamp(-448, 448)
    assert quotients.abs().max() == 448
    rounded = quotients.to(torch.float8_e4m3fn).float() * input_scale.float()
    assert relative_error(got, rounded @ (codes.float() * scales.float()[:, None]).T) < 1e-3


def test_what_has_no_kernels() -> None:
    """Rows of codes that the copy engine cannot fetch, other cards, other types; no tokens have no launches."""
    sizes = Sizes(144, 80, 8, 8, 2, 1)
    assert not moe_tactics(Sizes(144, 72, 8, 8, 2, 1), "float16", 90)
    assert not moe_tactics(sizes, "float16", 80)
    assert not moe_tactics(sizes, "float32", 90)
    assert not moe_tactics(Sizes(144, 80, 128, 128, 2, 1), "bfloat16", 90)
    assert not linear_tactics(48, 24, "float16", 90)
    assert moe_tactics(sizes, "float16", 90)[0].launches(((0, 144),)) == ()
    assert linear_tactics(48, 32, "bfloat16", 90)[0].launches(((2, 0, 32),)) == ()


@pytest.mark.parametrize("promoted", [False, True])
def test_products_compile(promoted: bool) -> None:
    """Without spills, products that wait for nothing of each other; the widest rows of Mixtral."""
    (tactic,) = (
        each
        for each in moe_tactics(Sizes(6144, 16384, 8, 8, 2, 1), "bfloat16", 90)
        if promoted == ("promoted" in each.name)
    )
    products = [kernel for kernel in tactic.kernels if isinstance(kernel, CudaKernel)]
    assert len(products) == 2
    for kernel in products if promoted else products[:1]:
        assert_fits(kernel, 90)


def test_linear_compiles() -> None:
    for kernel in linear_tactics(6144, 4096, "float16", 90)[1].kernels:
        assert_fits(kernel, 90)
