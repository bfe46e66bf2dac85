"""FP8 products with many rows on a GPU, against float32 torch on the same codes, and what matrix units lose of their sums."""

from __future__ import annotations

import math

import pytest
import torch

from moecompiler.plugins.launch import Tactic
from moecompiler.plugins.moe.tiles import Sizes
from moecompiler.plugins.quantized.grouped_fp8 import linear_tactics, moe_tactics
from moecompiler.tools.kernel_timing import compute_capability, graph_of, prepare, relative_error
from moecompiler.tools.quantized_layers import QuantizedLayer, coded_matrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 5e-3}


def bound(tactic: Tactic, dtype: torch.dtype, columns: int, quantized_between: bool) -> float:
    """Sums that are not promoted lose about the half of 2^-13 of themselves with each product of 32 columns, others a thousandth
    at most. Codes are 0.09 of themselves apart, so a relative error e moves e / 0.09 of them by as much."""
    lost = 1e-3 if "promoted" in tactic.name else 1e-3 + columns / 32 * 2**-14
    return ROUNDING[dtype] + lost + (math.sqrt(2 * lost * 0.09) if quantized_between else 0)


@pytest.fixture(autouse=True)
def on_hopper(gpu: None) -> None:
    if compute_capability() != 90:
        pytest.skip("only SM 9.0 has these kernels")


def check_moe(layer: QuantizedLayer, x: torch.Tensor) -> None:
    """Every tactic agrees with float32, gives the same bits again, and does so from a CUDA graph."""
    want, inputs, dims = layer.expected(x), layer.inputs(x), layer.dims(len(x))
    local, experts, top_k = len(layer.expert_ids), len(layer.router), layer.attributes["top_k"]
    sizes = Sizes(layer.hidden, layer.intermediate, experts, local, top_k, layer.attributes["normalization_mode"])
    found = moe_tactics(sizes, str(layer.dtype).removeprefix("torch."), 90)
    assert len(found) == 2
    for tactic in found:
        prepared = prepare(tactic, dims)
        first, second = (torch.full_like(x, math.nan) for _ in range(2))
        prepared(inputs, [first])
        columns = max(layer.hidden, layer.intermediate)
        assert relative_error(first, want) < bound(tactic, layer.dtype, columns, True), tactic.name
        graph = graph_of(lambda prepared=prepared, out=second: prepared(inputs, [out]))  # type: ignore[misc]
        second.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def layer(request: pytest.FixtureRequest) -> QuantizedLayer:
    return QuantizedLayer("Fp8", 4096, 1792, dtype=request.param)


@pytest.mark.parametrize("tokens", [1, 3, 17, 65, 129, 300, 500, 1200, 2500])
def test_moe(layer: QuantizedLayer, tokens: int) -> None:
    """Tiles of every width but a few, one and several for an expert."""
    torch.manual_seed(tokens)
    check_moe(layer, torch.randn(tokens, 4096, device="cuda").to(layer.dtype))


@DTYPES
@pytest.mark.parametrize(
    ("hidden", "intermediate", "top_k", "expert_ids"),
    [(1008, 1104, 3, (4, 0, 3)), (144, 80, 1, range(5)), (512, 16, 2, (2,))],
)
@pytest.mark.parametrize("tokens", [17, 65, 300])
def test_moe_of_odd_sizes(
    hidden: int, intermediate: int, top_k: int, expert_ids: tuple[int, ...], tokens: int, dtype: torch.dtype
) -> None:
    """Steps and tiles that end within a row; some of five experts, in any order; experts without a token."""
    torch.manual_seed(tokens)
    layer = QuantizedLayer("Fp8", hidden, intermediate, 0, tuple(expert_ids), 5, top_k, dtype=dtype)
    check_moe(layer, torch.randn(tokens, hidden, device="cuda").to(dtype))


@pytest.mark.parametrize("tokens", [17, 600])
def test_all_tokens_on_two_experts(layer: QuantizedLayer, tokens: int) -> None:
    torch.manual_seed(0)
    before = layer.router.clone()
    layer.router[2], layer.router[6] = 0.05, 0.04
    check_moe(layer, torch.rand(tokens, 4096, device="cuda").to(layer.dtype))
    layer.router.copy_(before)


@DTYPES
@pytest.mark.parametrize(("rows", "columns"), [(6144, 4096), (1040, 14336), (48, 272)])
@pytest.mark.parametrize("tokens", [1, 17, 129, 1200])
def test_linear(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    matrix = coded_matrix("Fp8", rows, columns, 0, dtype, "cuda", generator)
    x = torch.randn(1, tokens, columns, device="cuda", generator=generator).to(dtype)
    scale = torch.tensor([3.0 / 448], device="cuda").to(dtype)
    rounded = (x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale.float()
    want = rounded @ matrix.numbers(0, rows).T
    for tactic in linear_tactics(rows, columns, str(dtype).removeprefix("torch."), 90):
        got = torch.full((1, tokens, rows), math.nan, device="cuda", dtype=dtype)
        dims = (tuple(x.shape), (rows, columns), (rows,), (1,))
        prepare(tactic, dims)([x, matrix.codes, *matrix.parts, scale], [got])
        assert relative_error(got, want) < bound(tactic, dtype, columns, False), tactic.name


@pytest.mark.parametrize("tokens", [17, 700])
def test_moe_where_tactics_are_timed(layer: QuantizedLayer, tokens: int) -> None:
    """On memory that nobody has filled: zeros, the same id for every expert, NaN. It ends, whatever the result."""
    sizes = Sizes(4096, 1792, 8, 8, 2, 1)
    for tactic in moe_tactics(sizes, str(layer.dtype).removeprefix("torch."), 90):
        for value in (0.0, math.nan):
            x = torch.full((tokens, 4096), value, device="cuda", dtype=layer.dtype)
            inputs = layer.inputs(x)
            inputs[-1] = torch.zeros_like(inputs[-1])
            prepare(tactic, layer.dims(tokens))(inputs, [torch.empty_like(x)])
            torch.cuda.synchronize()
