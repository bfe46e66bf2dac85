"""The compiled kernels of quantized MoE ops on a GPU against float32 torch, on the numbers that codes stand for."""

from __future__ import annotations

import pytest
import torch

from moecompiler.plugins.tactics import tactics
from moecompiler.tools.kernel_timing import compute_capability, graph_of, prepare, relative_error
from moecompiler.tools.quantized_layers import QuantizedLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
KINDS = [
    ("Int8", 0),
    ("Fp8", 0),
    ("Nvfp4", 16),
    ("Int4", 128),
    ("Int4", 64),
    ("Int4", 16),
    ("Int4Asymmetric", 128),
    ("Int4Asymmetric", 48),
    ("Int4Rows", 0),
    ("Int4AsymmetricRows", 0),
]
BOUNDS = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


def check(layer: QuantizedLayer, x: torch.Tensor) -> None:
    """Every tactic agrees with float32, gives the same bits again, and does so from a CUDA graph."""
    want, dims = layer.expected(x), layer.dims(len(x))
    bound = max(BOUNDS[x.dtype], 1.5e-2 if layer.kind == "Fp8" else 0)  # now and then another of two E4M3 neighbours
    found = tactics(layer.op, layer.attributes, dims, str(x.dtype).removeprefix("torch."), compute_capability())
    assert found
    for tactic in found:
        prepared = prepare(tactic, dims)
        first, second = (torch.full_like(x, float("nan")) for _ in range(2))
        prepared(layer.inputs(x), [first])
        assert relative_error(first, want) < bound or not want.any(), tactic.name
        graph = graph_of(lambda prepared=prepared, out=second: prepared(layer.inputs(x), [out]))  # type: ignore[misc]
        second.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(second, first, rtol=0, atol=0, msg=tactic.name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("kind", "block"), KINDS)
def test_any_number_of_tokens(kind: str, block: int, dtype: torch.dtype) -> None:
    layer = QuantizedLayer(kind, 1536, 768, block, dtype=dtype)
    for tokens in (1, 3, 9, 17, 64, 129, 700):
        torch.manual_seed(tokens)
        check(layer, torch.randn(tokens, 1536, device="cuda").to(dtype))


@pytest.mark.parametrize(("kind", "block"), KINDS)
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_routing(kind: str, block: int, mode: int) -> None:
    """Five experts of which three are here, one to three of them a token's; rows that end within a tile."""
    hidden, intermediate = (640, 384) if block in (64, 128) else (672, 288)
    layer = QuantizedLayer(kind, hidden, intermediate, block, (4, 0, 3), 5, mode + 1, mode)
    for tokens in (1, 17, 129):
        torch.manual_seed(tokens)
        check(layer, torch.randn(tokens, hidden, device="cuda").half())


@pytest.mark.parametrize(("kind", "block"), KINDS)
def test_all_tokens_on_two_experts(kind: str, block: int) -> None:
    layer = QuantizedLayer(kind, 768, 384, block)
    layer.router[2], layer.router[6] = 0.05, 0.04
    for tokens in (16, 600):
        torch.manual_seed(tokens)
        check(layer, torch.rand(tokens, 768, device="cuda").half())


@pytest.mark.parametrize(("kind", "block"), KINDS)
def test_where_tactics_are_timed(kind: str, block: int) -> None:
    """On memory that nobody has filled: zeros, the same id for every expert, NaN. It ends, whatever the result."""
    layer = QuantizedLayer(kind, 768, 384, block)
    layer.expert_ids.zero_()
    for tokens in (1, 17, 700):
        dims = layer.dims(tokens)
        for tactic in tactics(layer.op, layer.attributes, dims, "float16", compute_capability()):
            for value in (0.0, float("nan")):
                x = torch.full((tokens, 768), value, device="cuda", dtype=torch.float16)
                prepare(tactic, dims)(layer.inputs(x), [torch.empty_like(x)])
                torch.cuda.synchronize()
