"""Products with quantized weights on a GPU: every tactic, against the numbers that codes stand for in float32."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from moecompiler.plugins.quantized.linear_launch import tactics  # noqa: E402
from moecompiler.tools.kernel_timing import compute_capability, prepare, relative_error  # noqa: E402
from moecompiler.tools.random_codes import FORMATS, Format, RandomWeight  # noqa: E402

pytestmark = pytest.mark.gpu

TOKENS = (1, 3, 17, 65, 129, 300)
OTHERS = (
    Format("LinearInt4", 32),
    Format("LinearInt4Rows"),
    Format("LinearInt4Asymmetric", 64),
    Format("LinearInt4AsymmetricRows"),
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("out", "columns"), [(1024, 1024), (144, 2176)])
@pytest.mark.parametrize("form", FORMATS + OTHERS, ids=str)
def test_products(form: Format, out: int, columns: int, dtype: str) -> None:
    """Sizes of whole tiles, and of none."""
    weight = RandomWeight(form, out, columns, getattr(torch, dtype), "cuda")
    found = tactics(form.op, form.attributes, weight.dims(-1, -1), dtype, compute_capability())
    assert found
    # the matrix units of SM 9.0 add products of E4M3 in 14 bits
    bound = 1e-2 if "Fp8" in form.op or dtype == "bfloat16" else 2e-3
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device="cuda").to(weight.dtype)
        expected = weight.product(x)
        for tactic in found:
            y = torch.full((tokens, out), float("nan"), dtype=weight.dtype, device="cuda")
            prepare(tactic, weight.dims(tokens))([x, *weight.inputs], [y])
            error = relative_error(y, expected)
            assert error < bound, f"{tactic.name}, {tokens} tokens: {error}"
