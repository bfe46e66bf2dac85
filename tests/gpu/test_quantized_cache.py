"""Attention over caches of codes on a GPU: every tactic against float32 torch, and against the op's body in ONNX Runtime."""

from __future__ import annotations

import pytest
import torch

from moecompiler.plugins.tactics import tactics
from moecompiler.tools.bench_attention import Case, expected, random_inputs, to_codes
from moecompiler.tools.kernel_timing import compute_capability, graph_of, prepare, relative_error

pytestmark = pytest.mark.gpu
CACHES = ("int8", "fp8", "fp8_context")
# torch rotates in float32 as the kernels do; what it rounds to another code nevertheless is in the bound
BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 1, 300, 512, 32, 8, 128),
        (1, 1, 0, 64, 8, 8, 64),
        (3, 1, 4000, 4096, 16, 1, 128),
        (17, 1, 65, 100, 6, 2, 96),
        (2, 1, 1000, 1111, 24, 2, 48),
        (2, 129, 0, 256, 8, 2, 128),
        (3, 17, 100, 300, 6, 2, 96),
        (1, 700, 333, 1100, 4, 4, 64),
    ],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_tactics(sizes: tuple[int, ...], cache: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = Case(*sizes, cache=cache)
    inputs = random_inputs(case, dtype)
    want = expected(case, inputs)
    before = [inputs[6].clone(), inputs[7].clone()]
    name = str(dtype).removeprefix("torch.")
    found = tactics(case.op, case.attributes, case.dims, name, compute_capability())
    assert found
    for tactic in found:
        inputs[6:8] = [each.clone() for each in before]
        prepared = prepare(tactic, case.dims)
        first, second = (torch.full_like(inputs[0], float("nan")) for _ in range(2))
        prepared(inputs, [first, inputs[6], inputs[7]])
        bound = 3 * BOUNDS[dtype] if cache == "fp8_context" and case.new > 1 else BOUNDS[dtype]
        assert relative_error(first, want) < bound, tactic.name
        value = inputs[2].view(case.batch, case.new, case.kv_heads, case.head_dim).transpose(1, 2)
        written = to_codes(value, inputs[9], cache).view(torch.int8)
        got = inputs[7][:, :, case.past : case.past + case.new]
        assert (got != written).float().mean() < 1e-3, tactic.name  # division by the scale may be off by its last digit
        kept = torch.ones(case.slots, dtype=torch.bool, device="cuda")
        kept[case.past : case.past + case.new] = False
        for mine, old in zip(inputs[6:8], before, strict=True):
            assert torch.equal(mine[:, :, kept], old[:, :, kept]), tactic.name
        graph = graph_of(lambda prepared=prepared, out=second: prepared(inputs, [out, inputs[6], inputs[7]]))  # type: ignore[misc]
        second.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(second, first, rtol=0, atol=0)
