"""The compiled kernels on a GPU, at real sizes, against float32 torch on the same rounded weights."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from moecompiler.config import NormalizationMode
from moecompiler.plugins.attention.cluster_decode import ClusterDecode
from moecompiler.plugins.attention.launch import AttentionTactic
from moecompiler.plugins.tactics import tactics
from moecompiler.routing import route
from moecompiler.tools.bench_attention import Case, expected, random_inputs
from moecompiler.tools.bench_moe import Layer, Weights
from moecompiler.tools.kernel_timing import compute_capability, graph_of, prepare, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class Node:
    """A MoE node: a layer's weights and how it routes."""

    def __init__(self, weights: Weights, experts: int, top_k: int, mode: int):
        self.weights, self.top_k, self.mode = weights, top_k, NormalizationMode(mode)
        self.router = weights.router[:experts].contiguous()

    def check(self, x: torch.Tensor) -> None:
        """Every tactic agrees with float32, gives the same bits again, and does so from a CUDA graph."""
        weights, experts = route((x @ self.router.T).float(), self.top_k, self.mode)
        want = torch.zeros(x.shape, device="cuda")
        for local, expert in enumerate(self.weights.expert_ids.tolist()):
            token, k = (experts == expert).nonzero(as_tuple=True)
            gate, up = (x[token].float() @ self.weights.gate_up[local].float().T).chunk(2, -1)
            result = (torch.nn.functional.silu(gate) * up) @ self.weights.down[local].float().T
            want.index_add_(0, token, result * weights[token, k, None])
        inputs = self.weights.inputs(x)
        inputs[1] = self.router
        dims = tuple(tuple(value.shape) for value in inputs)
        attributes = {"top_k": self.top_k, "normalization_mode": int(self.mode)}
        dtype = str(x.dtype).removeprefix("torch.")
        for tactic in tactics("MoE", attributes, dims, dtype, compute_capability()):
            prepared = prepare(tactic, dims)
            first, second = (torch.full_like(x, float("nan")) for _ in range(2))
            prepared(inputs, [first])
            assert relative_error(first, want) < BOUNDS[x.dtype] or not want.any()
            graph = graph_of(lambda prepared=prepared, out=second: prepared(inputs, [out]))  # type: ignore[misc]
            second.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def weights(request: pytest.FixtureRequest) -> Weights:
    return Weights(Layer("8x7b tp8", 4096, 1792), request.param)


@pytest.mark.parametrize("tokens", [1, 3, 17, 33, 64, 129, 500, 1025, 5000])
def test_moe_of_any_number_of_tokens(weights: Weights, tokens: int) -> None:
    torch.manual_seed(tokens)
    Node(weights, 8, 2, 1).check(torch.randn(tokens, 4096, device="cuda").to(weights.dtype))


@pytest.mark.parametrize("mode", list(NormalizationMode))
@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 3), (5, 2)])
@pytest.mark.parametrize("tokens", [1, 17, 129])
def test_moe_routing(weights: Weights, mode: int, experts: int, top_k: int, tokens: int) -> None:
    """With 5 experts, the layer's last three are no token's."""
    torch.manual_seed(tokens)
    Node(weights, experts, top_k, mode).check(torch.randn(tokens, 4096, device="cuda").to(weights.dtype))


@pytest.mark.parametrize("tokens", [17, 600])
def test_all_tokens_on_two_experts(weights: Weights, tokens: int) -> None:
    torch.manual_seed(0)
    node = Node(weights, 8, 2, 1)
    node.router[2], node.router[6] = 0.05, 0.04
    Node.check(node, torch.rand(tokens, 4096, device="cuda").to(weights.dtype))


@pytest.mark.parametrize("tokens", [1, 3, 129])
def test_moe_of_local_experts(tokens: int) -> None:
    """Two of eight experts, not the first ones: tokens of others get zeros."""
    torch.manual_seed(tokens)
    weights = Weights(Layer("ep4", 4096, 1792, local=2), torch.float16)
    weights.expert_ids += 3
    Node(weights, 8, 2, 1).check(torch.randn(tokens, 4096, device="cuda").half())


@pytest.mark.parametrize("tokens", [1, 17, 700])
def test_moe_where_tactics_are_timed(tokens: int) -> None:
    """On memory that nobody has filled: zeros, the same id for every expert, NaN. It ends, whatever the result."""
    weights = Weights(Layer("8x7b tp8", 4096, 1792), torch.float16)
    weights.expert_ids.zero_()
    dims = weights.dims(tokens)
    for tactic in tactics("MoE", {"top_k": 2, "normalization_mode": 1}, dims, "float16", compute_capability()):
        for value in (0.0, float("nan")):
            x = torch.full((tokens, 4096), value, device="cuda", dtype=torch.float16)
            prepare(tactic, dims)(weights.inputs(x), [torch.empty_like(x)])
            torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(
    ("batch", "new", "past", "slots"),
    [(1, 1, 0, 64), (4, 1, 2047, 2048), (3, 1, 1000, 4096), (2, 129, 0, 300), (1, 1000, 3000, 4096), (3, 17, 200, 256)],
)
def test_attention(dtype: torch.dtype, head_dim: int, batch: int, new: int, past: int, slots: int) -> None:
    torch.manual_seed(0)
    case = Case(batch, new, past, slots, head_dim=head_dim)
    inputs = random_inputs(case, dtype)
    want = expected(case, inputs)
    name = str(dtype).removeprefix("torch.")
    for tactic in tactics("Attention", case.attributes, case.dims, name, compute_capability()):
        caches = [cache.clone() for cache in inputs[6:]]
        got = torch.full_like(inputs[0], float("nan"))
        prepare(tactic, case.dims)([*inputs[:6], *caches], [got, *caches])
        assert relative_error(got, want) < BOUNDS[dtype]
        rows = inputs[2].view(batch, new, 8, head_dim).transpose(1, 2)
        torch.testing.assert_close(caches[1][:, :, past : past + new], rows, rtol=0, atol=0)
        for cache, before in zip(caches, inputs[6:], strict=True):  # nothing else is touched
            torch.testing.assert_close(cache[:, :, :past], before[:, :, :past], rtol=0, atol=0)
            torch.testing.assert_close(cache[:, :, past + new :], before[:, :, past + new :], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(32, 8, 128), (32, 32, 128), (32, 4, 128), (32, 2, 128), (12, 1, 72), (6, 2, 64), (32, 8, 96), (4, 2, 24)],
)
@pytest.mark.parametrize("slots", [1101, 70])
def test_decode_of_ragged_sequences(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, slots: int) -> None:
    """Slots that a sequence does not see hold NaN, its own too, before it is written; nothing else is touched."""
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 15, 16, slots // 2, slots - 1], device="cuda")
    case = Case(len(positions), 1, slots - 1, slots, heads, kv_heads, head_dim)
    inputs = random_inputs(case, dtype)
    inputs[5] = positions[:, None]
    want = expected(case, inputs)
    unseen = torch.arange(slots, device="cuda") >= positions[:, None]
    own = torch.arange(slots, device="cuda") == positions[:, None]
    poisoned = [cache.masked_fill(unseen[:, None, :, None], math.nan) for cache in inputs[6:]]
    name = str(dtype).removeprefix("torch.")
    for tactic in tactics("Attention", case.attributes, case.dims, name, compute_capability()):
        caches = [cache.clone() for cache in poisoned]
        got = torch.full_like(inputs[0], math.nan)
        prepare(tactic, case.dims)([*inputs[:6], *caches], [got, *caches])
        assert relative_error(got, want) < BOUNDS[dtype]
        rows = inputs[2].view(case.batch, kv_heads, 1, head_dim).expand_as(caches[1])
        wanted_values = torch.where(own[:, None, :, None], rows, poisoned[1])
        torch.testing.assert_close(caches[1], wanted_values, rtol=0, atol=0, equal_nan=True)
        others = ~own[:, None, :, None].expand_as(caches[0])
        torch.testing.assert_close(caches[0][others], poisoned[0][others], rtol=0, atol=0, equal_nan=True)
        assert not caches[0][~others].isnan().any()


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_decode_in_any_number_of_parts(parts: int) -> None:
    """Also more than the plan would choose, some of which see nothing; twice the same bits."""
    torch.manual_seed(0)
    case = Case(3, 1, 600, 640)
    inputs = random_inputs(case, torch.float16)
    tactic = tactics("Attention", case.attributes, case.dims, "float16", compute_capability())[0]
    if not isinstance(tactic, AttentionTactic) or not isinstance(tactic.decode, ClusterDecode):
        pytest.skip("only SM 9.0 has clusters here")
    prepared = prepare(tactic, case.dims)
    (launch,) = prepared.launches
    divided = dataclasses.replace(launch, grid=(parts, *launch.grid[1:]), cluster=parts)
    for past in (600, 0, 63, 64):
        inputs[5].fill_(past)
        want = expected(case, inputs)
        got = [torch.full_like(inputs[0], math.nan) for _ in range(2)]
        for output in got:
            prepared.run([divided], inputs, [output, inputs[6], inputs[7]])
        assert relative_error(got[0], want) < BOUNDS[torch.float16]
        torch.testing.assert_close(got[1], got[0], rtol=0, atol=0)


@pytest.mark.parametrize("new", [1, 130])
@pytest.mark.parametrize("window", [1, 100, 257])
def test_attention_window(new: int, window: int) -> None:
    """A window hides what lies before it: the same as a cache in which that is not."""
    torch.manual_seed(0)
    case = Case(2, new, 700, 1024)
    inputs = random_inputs(case, torch.float16)
    windowed = case.attributes | {"window": window}
    for tactic in tactics("Attention", windowed, case.dims, "float16", compute_capability()):
        got = torch.full_like(inputs[0], float("nan"))
        prepare(tactic, case.dims)(inputs, [got, inputs[6], inputs[7]])
        want = _windowed(case, inputs, window)
        assert relative_error(got, want) < BOUNDS[torch.float16]


def _windowed(case: Case, inputs: list[torch.Tensor], window: int) -> torch.Tensor:
    """Over a cache that holds the new tokens."""
    query, _, _, cos, sin, positions, keys, values = inputs
    q = query.view(case.batch, case.new, case.heads, case.head_dim).transpose(1, 2).float()
    low, high = q.chunk(2, -1)
    q = (q * cos.float() + torch.cat((-high, low), -1) * sin.float()).half().float()
    group = case.heads // case.kv_heads
    k, v = (cache.float().repeat_interleave(group, 1) for cache in (keys, values))
    slot, position = torch.arange(case.slots, device="cuda"), positions[:, None, :, None]
    scores = (q @ k.transpose(2, 3)) / math.sqrt(case.head_dim)
    scores = scores.masked_fill(~((slot <= position) & (slot > position - window)), float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(query.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 4096), (3, 17, 6144)])
def test_norms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    residual, branch = torch.randn(2, *shape, device="cuda").to(dtype)
    weight = torch.randn(shape[-1], device="cuda").to(dtype)
    x = residual + branch
    wide = x.float()
    want = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype) * weight
    name = str(dtype).removeprefix("torch.")
    for op, inputs in (("RMSNorm", [x, weight]), ("AddRMSNorm", [residual, branch, weight])):
        dims = tuple(tuple(value.shape) for value in inputs)
        outputs = [torch.full_like(x, float("nan")) for _ in range(len(inputs) - 1)]
        (tactic,) = tactics(op, {"epsilon": 1e-5}, dims, name, compute_capability())
        prepare(tactic, dims)(inputs, outputs)
        torch.testing.assert_close(outputs[0], want, rtol=2e-2, atol=1e-3)
        if op == "AddRMSNorm":
            torch.testing.assert_close(outputs[1], x, rtol=0, atol=0)
