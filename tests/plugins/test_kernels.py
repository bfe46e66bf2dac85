"""Every op's kernels, run by Triton's interpreter, compute what the op's body does in ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from interpreted import interpret, interpreter
from opmodels import run_op

from moecompiler.config import NormalizationMode
from moecompiler.ops import OpSpec
from moecompiler.plugins.attention.op import ATTENTION
from moecompiler.plugins.launch import AnyKernel, Dims, Input, Launch, Output, Tactic
from moecompiler.plugins.moe.compiled import COMBINED_COLUMNS, NodeKernels
from moecompiler.plugins.moe.launch import MoETactic
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.plugins.moe.tiles import Few, Many, Sizes, Tile
from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM, RMS_NORM
from moecompiler.plugins.tactics import tactics

BOUND = 2e-3  # of float16: its steps are 1e-3 wide


@pytest.fixture(scope="module")
def interpreting() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as pool:
        yield pool


def assert_close(got: torch.Tensor, want: torch.Tensor, bound: float = BOUND) -> None:
    error = (got.float() - want.float()).norm()
    assert error <= bound * want.float().norm() + 1e-6, f"off by {error / want.float().norm():.1e}"


def compare(
    pool: ProcessPoolExecutor,
    spec: OpSpec,
    attributes: dict[str, Any],
    inputs: list[torch.Tensor],
    aliased: tuple[int, ...] = (),
    tactic: Tactic | None = None,
) -> None:
    """``aliased``: the inputs that the last outputs are written to."""
    want = [torch.from_numpy(array) for array in run_op(spec, attributes, *inputs)]
    fresh = want[: len(want) - len(aliased)]
    outputs = [*(torch.full_like(array, float("nan")) for array in fresh), *aliased]
    got = pool.submit(interpret, spec.name, attributes, "float16", inputs, outputs, tactic).result()
    for value, expected in zip(got, want, strict=True):
        assert_close(value, expected)


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 5, 40)])
def test_norms(interpreting: ProcessPoolExecutor, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    residual, branch = (10 * torch.randn(2, *shape)).half()
    weight = torch.randn(shape[-1]).half()
    compare(interpreting, RMS_NORM, {"epsilon": 1e-5}, [residual, weight])
    compare(interpreting, ADD_RMS_NORM, {"epsilon": 1e-5}, [residual, branch, weight])


def moe_inputs(tokens: int, experts: int, local: tuple[int, ...], hidden: int, intermediate: int) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    x, router = torch.randn(tokens, hidden), torch.randn(experts, hidden)
    gate_up = 0.3 * torch.randn(len(local), 2 * intermediate, hidden)
    down = 0.3 * torch.randn(len(local), hidden, intermediate)
    return [x.half(), router.half(), gate_up.half(), down.half(), torch.tensor(local)]


def default(attributes: dict[str, Any], inputs: list[torch.Tensor]) -> MoETactic:
    tactic = tactics("MoE", attributes, tuple(tuple(value.shape) for value in inputs), "float16", 80)[0]
    assert isinstance(tactic, MoETactic)
    return tactic


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(
    ("mode", "experts", "top_k", "local"),
    [(0, 8, 2, range(8)), (1, 5, 1, (4,)), (1, 5, 3, (3, 0, 2)), (2, 5, 3, range(5)), (2, 8, 2, (7, 1))],
)
def test_moe_of_few_tokens(
    interpreting: ProcessPoolExecutor, mode: int, experts: int, top_k: int, local: Any, tokens: int
) -> None:
    """All experts or some, in any order; with one expert a token, some have no token, and some tokens no local expert."""
    attributes = {"top_k": top_k, "normalization_mode": mode}
    inputs = moe_inputs(tokens, experts, tuple(local), 40, 72)
    spec = moe_spec(NormalizationMode(mode), top_k)
    tactic = default(attributes, inputs)
    if tokens == 3:
        tactic = dataclasses.replace(tactic, few=(Few(16, 32, 32, parts=2),))
    compare(interpreting, spec, attributes, inputs, tactic=tactic)


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize(("mode", "top_k", "local"), [(0, 1, (2,)), (1, 3, range(5)), (2, 2, (4, 0, 3))])
def test_moe_of_many_tokens(interpreting: ProcessPoolExecutor, mode: int, top_k: int, local: Any, tails: bool) -> None:
    """Sorted by expert; the down product has whole turns, shared tiles and parts to be added."""
    attributes = {"top_k": top_k, "normalization_mode": mode}
    inputs = moe_inputs(19, 5, tuple(local), 72, 40)
    tile = Tile(16, 16)
    tactic = dataclasses.replace(
        default(attributes, inputs), one=None, few=(), many=(Many(0, 16, tile, tile, tails),), processors=3
    )
    compare(interpreting, moe_spec(NormalizationMode(mode), top_k), attributes, inputs, tactic=tactic)


@pytest.mark.parametrize("tokens", [17, 71, 75, 90])
def test_all_tokens_on_one_expert(interpreting: ProcessPoolExecutor, tokens: int) -> None:
    """And none on the others. Of many tokens, the last tile of 32 rows is a quarter, a half, a whole one."""
    attributes = {"top_k": 1, "normalization_mode": 1}
    inputs = moe_inputs(tokens, 5, (0, 1, 2, 3, 4), 16, 24)
    inputs[0] = inputs[0].abs()
    inputs[1][3] = 2.0
    tactic = default(attributes, inputs)
    if tokens > 17:
        tile = Tile(16, 16)
        tactic = dataclasses.replace(tactic, one=None, few=(), many=(Many(0, 32, tile, tile, True),), processors=12)
    compare(interpreting, moe_spec(NormalizationMode.RENORMALIZE, 1), attributes, inputs, tactic=tactic)


@dataclasses.dataclass(frozen=True)
class OneKernel:
    """A plan of one launch, whose arguments are the inputs and then the output."""

    kernel: AnyKernel
    grid: tuple[int, int, int]
    name: str = "one kernel"

    @property
    def kernels(self) -> tuple[AnyKernel, ...]:
        return (self.kernel,)

    def workspace(self, dims: Dims) -> int:
        return 0

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        inputs = [Input(index) for index in range(len(self.kernel.signature) - 1)]
        return (Launch(0, self.grid, (*inputs, Output(0))),)


def test_combination_of_grouped_products(interpreting: ProcessPoolExecutor) -> None:
    """What CUDA C++ has multiplied, row by row; -1 is another rank's, and adds nothing."""
    torch.manual_seed(0)
    hidden, places = 1100, torch.tensor([[3, 0], [-1, 2], [-1, -1], [1, 4]], dtype=torch.int32)
    results, weights = torch.randn(5, hidden).half(), torch.rand(4, 2)
    kernel = NodeKernels(Sizes(hidden, 8, 8, 8, 2, 1), "float16", 80).grouped()["sorted_combine",]
    plan = OneKernel(kernel, (4, -(-hidden // COMBINED_COLUMNS), 1))
    output = torch.full((4, hidden), float("nan"), dtype=torch.float16)
    (got,) = interpreting.submit(interpret, "MoE", {}, "float16", [results, places, weights], [output], plan).result()
    parts = torch.where(places[..., None] >= 0, results.float()[places.clamp(min=0).long()], 0.0)
    assert_close(got, (parts * weights[..., None]).sum(1))


@pytest.mark.parametrize("tokens", [3, 19])
def test_ids_that_are_no_ids(interpreting: ProcessPoolExecutor, tokens: int) -> None:
    """Where TensorRT times tactics, all expert ids may be the same: a row goes to one of them, and nothing beyond memory."""
    attributes = {"top_k": 2, "normalization_mode": 1}
    inputs = moe_inputs(tokens, 5, (0, 0, 0), 24, 40)
    tactic = default(attributes, inputs)
    if tokens > 3:
        tile = Tile(16, 16)
        tactic = dataclasses.replace(tactic, one=None, few=(), many=(Many(0, 16, tile, tile),), processors=2)
    last = [*inputs[:2], inputs[2][2:], inputs[3][2:], inputs[4][2:]]
    (want,) = run_op(moe_spec(NormalizationMode.RENORMALIZE, 2), attributes, *last)
    output = torch.full_like(inputs[0], float("nan"))
    (got,) = interpreting.submit(interpret, "MoE", attributes, "float16", inputs, [output], tactic).result()
    assert_close(got, torch.from_numpy(want))


def test_bfloat16(interpreting: ProcessPoolExecutor) -> None:
    """Against the body in float32: ONNX Runtime's CPU has no bfloat16; one token: the interpreter multiplies no such matrices."""
    attributes = {"top_k": 2, "normalization_mode": 1}
    inputs = [
        value.bfloat16() if value.is_floating_point() else value for value in moe_inputs(1, 8, (1, 5, 2, 7), 40, 72)
    ]
    wide = [value.float() if value.is_floating_point() else value for value in inputs]
    (want,) = run_op(moe_spec(NormalizationMode.RENORMALIZE, 2), attributes, *wide)
    output = torch.full((1, 40), float("nan"), dtype=torch.bfloat16)
    (got,) = interpreting.submit(interpret, "MoE", attributes, "bfloat16", inputs, [output]).result()
    assert_close(got, torch.from_numpy(want), 2e-2)


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "first", "length"),
    [
        (4, 2, 64, [3, 0, 69], 1),
        (4, 2, 64, [0, 0, 0], 17),
        (3, 1, 96, [7, 1, 68], 3),
        (2, 2, 128, [40], 1),
        (8, 1, 8, [60, 1], 40),
    ],
)
def test_attention(
    interpreting: ProcessPoolExecutor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    first: list[int],
    length: int,
    window: int,
) -> None:
    """Decode and prefill of a ragged batch, behind tokens or none; the cache is written in place."""
    torch.manual_seed(0)
    batch, slots = len(first), 101
    positions = torch.tensor(first)[:, None] + torch.arange(length)
    rows = [torch.randn(batch, length, n * head_dim).half() for n in (heads, kv_heads, kv_heads)]
    angles = torch.randn(batch, 1, length, head_dim)
    cache = torch.randn(2, batch, kv_heads, slots, head_dim).half()
    attributes = {"num_heads": heads, "num_kv_heads": kv_heads, "scale": head_dim**-0.5, "window": window}
    inputs = [*rows, angles.cos().half(), angles.sin().half(), positions, cache[0], cache[1]]
    compare(interpreting, ATTENTION, attributes, inputs, aliased=(6, 7))
    if length == 1:  # parts that see no slot, and one that sees all
        tactic = tactics("Attention", attributes, tuple(tuple(value.shape) for value in inputs), "float16", 80)[0]
        tiles = dataclasses.replace(tactic.decode, slots=16)  # type: ignore[attr-defined]
        for processors in (2, 50):
            divided = dataclasses.replace(tactic, decode=tiles, processors=processors)  # type: ignore[type-var]
            compare(interpreting, ATTENTION, attributes, inputs, aliased=(6, 7), tactic=divided)
