"""Experts and linear layers of codes on many tokens, on a GPU, against float32 torch on the numbers that the codes stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from moecompiler.config import NormalizationMode
from moecompiler.plugins.quantized.dequantize import Form
from moecompiler.plugins.quantized.grouped_codes import linear_tactics, moe_tactics
from moecompiler.plugins.quantized.moe_node import QuantizedNode, node_of
from moecompiler.quantization.schemes import Format
from moecompiler.routing import route
from moecompiler.tools.kernel_timing import compute_capability, prepare, relative_error

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
FORMS = {
    "int8": (Form(Format.INT8, False), 0),
    "int4-64": (Form(Format.INT4, True), 64),
    "int4-128": (Form(Format.INT4, True), 128),
    "int4-rows": (Form(Format.INT4, False), 0),
    "asymmetric-64": (Form(Format.UINT4, True), 64),
    "asymmetric-128": (Form(Format.UINT4, True), 128),
    "asymmetric-rows": (Form(Format.UINT4, False), 0),
    "nvfp4": (Form(Format.E2M1, True), 16),
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Codes:
    """A matrix ``[rows, columns]``: what stands for it, and the numbers, float32."""

    inputs: list[torch.Tensor]
    numbers: torch.Tensor


def random_codes(form: Form, block: int, rows: int, columns: int, dtype: torch.dtype) -> Codes:
    """Of the scale that keeps products near 1."""
    size, blocks = columns**-0.5, columns // block if block else 1
    shape = (rows, blocks) if block else (rows,)
    scales = size * (0.5 + torch.rand(shape, device="cuda"))
    raw = torch.randint(
        -128, 128, (rows, columns // 2 if form.format is not Format.INT8 else columns), device="cuda", dtype=torch.int16
    )
    codes = raw.to(torch.int8)
    if form.format is Format.INT8:
        scales = (scales / 73).to(dtype)
        return Codes([codes, scales], codes.float() * scales.float()[:, None])
    nibbles = torch.stack((raw & 15, raw >> 4 & 15), -1).reshape(rows, columns)
    if form.format is Format.E2M1:
        magnitudes = torch.tensor(E2M1, device="cuda")[(nibbles & 7).long()]
        steps = (scales / size * 100).to(torch.float8_e4m3fn)
        of_rows = size / 300 * (0.5 + torch.rand(rows, device="cuda"))
        numbers = torch.where(nibbles > 7, -magnitudes, magnitudes).view(rows, blocks, 16) * steps.float()[..., None]
        return Codes([codes, steps.view(torch.int8), of_rows], numbers.view(rows, columns) * of_rows[:, None])
    steps = (scales / 5).to(dtype)
    signed = torch.where(nibbles > 7, nibbles - 16, nibbles).float().view(rows, blocks, -1)
    zeros = torch.randint(-8, 8, shape, device="cuda", dtype=torch.int8) if form.asymmetric else torch.zeros(shape)
    whole = signed - zeros.to("cuda").float().view(rows, blocks, 1)
    numbers = whole * steps.float().view(rows, blocks, 1)
    if block:
        numbers = numbers.to(dtype).float()  # as the body rounds
    return Codes([codes, steps, *([zeros] if form.asymmetric else [])], numbers.view(rows, columns))


@dataclass
class Layer:
    """A MoE node of random codes."""

    name: str
    dtype: torch.dtype
    hidden: int
    intermediate: int
    experts: int = 8
    local: tuple[int, ...] = tuple(range(8))
    top_k: int = 2
    gate_up: Codes = field(init=False)
    down: Codes = field(init=False)

    def __post_init__(self) -> None:
        form, block = FORMS[self.name]
        self.gate_up = random_codes(form, block, len(self.local) * 2 * self.intermediate, self.hidden, self.dtype)
        self.down = random_codes(form, block, len(self.local) * self.hidden, self.intermediate, self.dtype)
        self.router = (torch.randn(self.experts, self.hidden, device="cuda") * self.hidden**-0.5).to(self.dtype)

    def inputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, self.router, *self.gate_up.inputs, *self.down.inputs, torch.tensor(self.local, device="cuda")]

    def node(self, tokens: int) -> QuantizedNode:
        form, block = FORMS[self.name]
        x = torch.empty(tokens, self.hidden, dtype=self.dtype, device="meta")
        dims = tuple(tuple(value.shape) for value in self.inputs(x))
        attributes = {"top_k": self.top_k, "normalization_mode": 1, "block_size": block}
        name = str(self.dtype).removeprefix("torch.")
        node = node_of(f"MoE{form.name}", attributes, dims, name, compute_capability())
        assert node is not None
        return node

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        logits = (x @ self.router.T).float()
        weights, chosen = route(logits, self.top_k, NormalizationMode.RENORMALIZE)
        total = torch.zeros(x.shape, device="cuda")
        gate_up = self.gate_up.numbers.view(len(self.local), -1, self.hidden)
        down = self.down.numbers.view(len(self.local), self.hidden, -1)
        for i, expert in enumerate(self.local):
            token, k = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (x[token].float() @ gate_up[i].T).chunk(2, -1)
            total.index_add_(0, token, (torch.nn.functional.silu(gate) * up) @ down[i].T * weights[token, k, None])
        return total

    def run(self, x: torch.Tensor) -> torch.Tensor:
        (tactic,) = moe_tactics(self.node(len(x)))
        output = torch.full_like(x, float("nan"))
        prepare(tactic, tuple(tuple(value.shape) for value in self.inputs(x)))(self.inputs(x), [output])
        torch.cuda.synchronize()
        return output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("hidden", "intermediate"), [(1024, 1792), (640, 384)])
def test_experts(name: str, dtype: torch.dtype, hidden: int, intermediate: int) -> None:
    """Twice the same bits; tiles of every width."""
    torch.manual_seed(0)
    layer = Layer(name, dtype, hidden, intermediate)
    for tokens in (1, 17, 65, 129, 300, 1200):
        x = torch.randn(tokens, hidden, device="cuda").to(dtype)
        got, want = layer.run(x), layer.expected(x)
        assert relative_error(got, want) < BOUNDS[dtype], tokens
        torch.testing.assert_close(layer.run(x), got, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["int8", "int4-128", "nvfp4"])
@pytest.mark.parametrize(("experts", "local", "top_k"), [(8, (5, 2), 2), (5, (0, 1, 2, 3, 4), 3), (5, (4,), 1)])
def test_experts_of_a_rank(name: str, experts: int, local: tuple[int, ...], top_k: int) -> None:
    """Some of the experts, in any order; some without a token; all tokens on one."""
    torch.manual_seed(0)
    layer = Layer(name, torch.float16, 512, 640, experts, local, top_k)
    for tokens in (3, 17, 129):
        x = torch.rand(tokens, 512, device="cuda").half()
        if top_k == 1:
            layer.router[local[0]] = 0.1
        assert relative_error(layer.run(x), layer.expected(x)) < BOUNDS[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", FORMS)
def test_linear(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    form, block = FORMS[name]
    weight = random_codes(form, block, 1000, 896, dtype)
    kind = str(dtype).removeprefix("torch.")
    for tokens in (1, 17, 129, 700):
        x = torch.randn(tokens, 896, device="cuda").to(dtype)
        (tactic,) = linear_tactics(form, block, 1000, 896, kind, compute_capability())
        output = torch.full((tokens, 1000), float("nan"), device="cuda", dtype=dtype)
        prepare(tactic, (tuple(x.shape),))([x, *weight.inputs], [output])
        assert relative_error(output, x.float() @ weight.numbers.T) < BOUNDS[dtype]
