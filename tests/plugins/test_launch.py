"""Plans of launches: what they need, what they hold to, and that making one needs no Triton."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from moecompiler.plugins.launch import ALIGNMENT, Cubin, CudaKernel, Dims, Output, Tactic, Workspace
from moecompiler.plugins.tactics import tactics

MOE = {"top_k": 2, "normalization_mode": 1}
ATTENTION = {"num_heads": 32, "num_kv_heads": 8, "scale": 0.1, "window": 0}


def moe_dims(tokens: int, experts: int = 8, local: int = 8, hidden: int = 4096, intermediate: int = 14336) -> Dims:
    weights = ((local, 2 * intermediate, hidden), (local, hidden, intermediate), (local,))
    return ((tokens, hidden), (experts, hidden), *weights)


def attention_dims(batch: int, length: int, slots: int, head_dim: int = 128) -> Dims:
    rows = tuple((batch, length, heads * head_dim) for heads in (32, 8, 8))
    angles, cache = (batch, 1, length, head_dim), (batch, 8, slots, head_dim)
    return (*rows, angles, angles, (batch, length), cache, cache)


def norm_dims(batch: int, length: int) -> Dims:
    return ((batch, length, 4096), (4096,))


def of(op: str, attributes: dict[str, Any], dims: Dims, sm: int = 90) -> tuple[Tactic, ...]:
    found = tactics(op, attributes, dims, "float16", sm)
    assert found
    return found


CASES = [
    *(("MoE", MOE, moe_dims(tokens)) for tokens in (1, 2, 17, 64, 65, 300, 1024, 8192)),
    ("MoE", MOE, moe_dims(33, local=2)),
    ("MoE", MOE | {"top_k": 3}, moe_dims(100, experts=5, local=5)),
    *(
        ("Attention", ATTENTION, attention_dims(*sizes))
        for sizes in ((1, 1, 128), (4, 1, 2048), (300, 1, 64), (3, 40, 64))
    ),
    ("RMSNorm", {"epsilon": 1e-5}, norm_dims(3, 5)),
]


@pytest.mark.parametrize(("op", "attributes", "dims"), CASES)
@pytest.mark.parametrize("sm", [80, 90, 120])
def test_a_plan_fits_its_kernels_and_its_workspace(op: str, attributes: dict[str, Any], dims: Dims, sm: int) -> None:
    for tactic in of(op, attributes, dims, sm):
        launches = tactic.launches(dims)
        workspace = tactic.workspace(dims)
        assert launches
        assert not launches[0].overlapped
        assert workspace % ALIGNMENT == 0
        assert any(Output(0) in launch.args for launch in launches)
        for launch in launches:
            kernel = tactic.kernels[launch.kernel]
            assert len(launch.args) == len(kernel.signature)
            assert all(0 < size < 65536 for size in launch.grid[1:])
            assert 0 < launch.grid[0] < 2**31
            assert all(arg.offset < workspace for arg in launch.args if isinstance(arg, Workspace))
            assert not (launch.overlapped and sm < 90)
            assert launch.grid[0] % launch.cluster == 0
            assert launch.cluster == 1 or sm >= 90


@pytest.mark.parametrize(
    ("batch", "slots", "parts"), [(1, 128, 1), (1, 512, 4), (1, 4096, 8), (4, 2048, 4), (9, 2048, 2), (32, 4096, 1)]
)
def test_decode_is_divided_until_most_of_the_gpu_is_busy(batch: int, slots: int, parts: int) -> None:
    """On SM 9.0; a short cache is not worth it."""
    dims = attention_dims(batch, 1, slots)
    (launch,) = of("Attention", ATTENTION, dims)[0].launches(dims)
    assert (launch.grid, launch.cluster) == ((parts, 8, batch), parts)


@pytest.mark.parametrize(
    ("heads", "head_dim", "decode", "prefill"),
    [(8, 128, True, True), (17, 128, False, True), (8, 24, True, False), (17, 24, None, None), (8, 136, None, None)],
)
def test_only_what_a_kernel_takes_is_given_to_it(
    heads: int, head_dim: int, decode: bool | None, prefill: bool | None
) -> None:
    """Whether decode and prefill on SM 9.0 are CUDA C++; None where Triton's is the only tactic. One key-value head."""
    attributes = ATTENTION | {"num_heads": heads, "num_kv_heads": 1}
    found = of("Attention", attributes, attention_dims(1, 1, 64, head_dim))
    cuda = [
        [isinstance(kernel, CudaKernel) for kernel in tactic.kernels if kernel.function in ("decode", "prefill")]
        for tactic in found
    ]
    assert cuda == [[False, False]] if decode is None else [[decode, prefill], [False, False]]


@pytest.mark.parametrize("op", ["MoE", "Attention"])
def test_more_tokens_never_need_less_workspace(op: str) -> None:
    """So what the largest shapes need is enough for all."""
    sizes = [1, 2, 3, 16, 17, 32, 33, 64, 65, 128, 129, 160, 161, 959, 960, 961, 4096]
    dims = [moe_dims(n) if op == "MoE" else attention_dims(n, 1, 4096) for n in sizes]
    for tactic in of(op, MOE if op == "MoE" else ATTENTION, dims[0]):
        needs = [tactic.workspace(some) for some in dims]
        assert needs == sorted(needs)


def test_nothing_is_launched_for_nothing() -> None:
    assert of("MoE", MOE, moe_dims(1))[0].launches(moe_dims(0)) == ()
    assert of("Attention", ATTENTION, attention_dims(1, 1, 64))[0].launches(attention_dims(0, 1, 64)) == ()
    assert of("RMSNorm", {"epsilon": 1.0}, norm_dims(1, 1))[0].launches(norm_dims(1, 0)) == ()


@pytest.mark.parametrize(
    ("op", "attributes", "dims", "dtype"),
    [
        ("MoE", MOE, moe_dims(1), "float32"),
        ("MoE", MOE, moe_dims(1, intermediate=20), "float16"),
        ("Attention", ATTENTION, attention_dims(1, 1, 64, 12), "float16"),
        ("Attention", ATTENTION, attention_dims(1, 1, 64), "float32"),
        ("ContextAttention", {}, (), "float16"),
    ],
)
def test_what_has_no_kernels_has_no_tactics(op: str, attributes: dict[str, Any], dims: Dims, dtype: str) -> None:
    assert tactics(op, attributes, dims, dtype, 90) == ()


def test_unknown_dims_make_the_same_kernels() -> None:
    """A build knows neither tokens nor batch; the kernels hold neither."""
    for op, attributes, known, unknown in (
        ("MoE", MOE, moe_dims(5), moe_dims(-1)),
        ("Attention", ATTENTION, attention_dims(3, 4, 64), attention_dims(-1, -1, -1)),
        (
            "AddRMSNorm",
            {"epsilon": 1.0},
            (norm_dims(1, 2)[0], *norm_dims(1, 2)),
            (norm_dims(-1, -1)[0], *norm_dims(-1, -1)),
        ),
    ):
        for one, other in zip(of(op, attributes, known), of(op, attributes, unknown), strict=True):
            assert one.kernels == other.kernels


def test_a_cubin_keeps_through_bytes() -> None:
    cubin = Cubin(b"\x7fELF\n{}\n", "kernel", 98304, 8, 128)
    assert Cubin.from_bytes(cubin.to_bytes()) == cubin


def test_plans_need_neither_triton_nor_torch() -> None:
    code = (
        "import sys; sys.modules['triton'] = sys.modules['torch'] = None\n"
        "import moecompiler.plugins.driver\n"
        "from moecompiler.plugins.tactics import tactics\n"
        f"(t, *_) = tactics('MoE', {MOE}, {moe_dims(7)}, 'bfloat16', 90)\n"
        f"print(len(t.launches({moe_dims(7)})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "4\n", done.stderr
