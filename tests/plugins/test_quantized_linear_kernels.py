"""The kernels of quantized products, run by Triton's interpreter, compute what the numbers that codes stand for do.

That those are the numbers of the ops' bodies, ``test_quantized_op_bodies`` and its like check."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from interpreted import interpret, interpreter

from moecompiler.plugins.compile import compile_kernel
from moecompiler.plugins.launch import shared_memory
from moecompiler.plugins.quantized.linear_launch import tactics, triton_tactics, weight_of
from moecompiler.plugins.quantized.linear_tactic import LinearTactic, One, Tile
from moecompiler.tools.random_codes import Format, RandomWeight

FORMATS = (
    Format("LinearInt8"),
    Format("LinearFp8"),
    Format("LinearInt4", 32),
    Format("LinearInt4Rows"),
    Format("LinearInt4Asymmetric", 64),
    Format("LinearInt4AsymmetricRows"),
    Format("LinearNvfp4", 16),
)
ALL = pytest.mark.parametrize("form", FORMATS, ids=str)
# the interpreter multiplies no matrices of bfloat16
BOTH = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as made:
        yield made


def tactic_of(weight: RandomWeight, one: One | None, *tiles: Tile) -> LinearTactic:
    """Of a small card, so that columns are divided."""
    dtype = str(weight.dtype).removeprefix("torch.")
    found = tactics(weight.form.op, weight.form.attributes, weight.dims(-1, -1), dtype, 80)[0]
    assert isinstance(found, LinearTactic)
    return replace(found, one=one, tiles=tiles, processors=1)


def check(pool: ProcessPoolExecutor, weight: RandomWeight, tactic: LinearTactic, *leading: int) -> None:
    x = torch.randn(*leading, weight.columns, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    y = torch.full((*leading, weight.out), float("nan"), dtype=weight.dtype)
    inputs = [x, *weight.inputs]
    got = pool.submit(interpret, weight.form.op, {}, "", inputs, [y], tactic).result()[0].float()
    expected = weight.product(x)
    assert 0.3 < expected.std() < 6
    bound = (2e-3 if weight.dtype == torch.float16 else 1.5e-2) * expected.abs().max()
    torch.testing.assert_close(got, expected, rtol=0, atol=float(bound))


@ALL
@BOTH
def test_one_token(pool: ProcessPoolExecutor, form: Format, dtype: torch.dtype) -> None:
    """Rows and columns that fill no tile."""
    weight = RandomWeight(form, 7, 192, dtype)
    check(pool, weight, tactic_of(weight, One(4, 128), Tile(0, 16, 16, 64)), 1, 1)


@ALL
def test_few_tokens(pool: ProcessPoolExecutor, form: Format) -> None:
    """Columns divided among programs, the last of which has fewer."""
    weight = RandomWeight(form, 23, 192, torch.float16)
    tactic = tactic_of(weight, None, Tile(16, 16, 16, 64, programs=6, least=64), Tile(0, 16, 16, 64))
    assert len(tactic.launches(weight.dims(3, 1))) == 2
    check(pool, weight, tactic, 3, 1)


@ALL
def test_many_tokens(pool: ProcessPoolExecutor, form: Format) -> None:
    """x rounded or split first, weights scaled before the product; no multiple of a tile."""
    weight = RandomWeight(form, 40, 192, torch.float16)
    last = Tile(0, 32, 32, 128, programs=1, least=64, prepared=True, scaled=False)
    check(pool, weight, tactic_of(weight, None, Tile(4, 16, 16, 64), last), 2, 17)


def test_divided_among_programs() -> None:
    """As finely as keeps the card busy; what is kept for that is enough for fewer tokens too."""
    weight = RandomWeight(Format("LinearInt4", 128), 4096, 4096, torch.float16)
    for tactic in tactics("LinearInt4", {"block_size": 128}, weight.dims(-1, -1), "float16", 90):
        most = tactic.workspace(weight.dims(1, 4096))
        for tokens in (1, 2, 16, 17, 64, 65, 128, 129, 256, 300, 1024, 2000, 4096):
            dims = weight.dims(tokens, 1)
            launches = tactic.launches(dims)
            assert launches[0].overlapped is False
            assert all(launch.overlapped for launch in launches[1:])
            assert tactic.workspace(dims) <= most
            assert tactic.workspace(dims) % 256 == 0
    assert tactic.launches(weight.dims(1, 0)) == ()


@pytest.mark.parametrize(
    ("sm", "form", "dtype"),
    [
        (80, Format("LinearFp8"), "float16"),
        (89, Format("LinearFp8"), "bfloat16"),
        (90, Format("LinearInt4Asymmetric", 64), "bfloat16"),
        (100, Format("LinearInt8"), "float16"),
        (120, Format("LinearNvfp4", 16), "float16"),
    ],
)
def test_kernels_compile(sm: int, form: Format, dtype: str) -> None:
    """Without a GPU, and fit into it: for one token, the fewest tokens and the most."""
    weight = RandomWeight(form, 256, 512, torch.float16)
    found = weight_of(form.op, form.attributes, weight.dims(-1, -1))
    assert found is not None
    rows, tiles, _ = triton_tactics(found, dtype, sm)
    for kernel in (*rows.kernels[:2], tiles.kernels[-1]):
        cubin = compile_kernel(kernel, sm)
        assert cubin.image[:4] == b"\x7fELF"
        assert cubin.shared <= shared_memory(sm)


@pytest.mark.parametrize(
    ("op", "attributes", "dims", "dtype"),
    [
        ("LinearInt8", {}, ((-1, 40), (8, 40)), "float16"),  # rows are no multiples of 16 bytes
        ("LinearInt4", {"block_size": 8}, ((-1, 64), (8, 64)), "float16"),
        ("LinearInt4Ordered", {"block_size": 64}, ((-1, 64), (8, 64)), "float16"),
        ("LinearFp8", {}, ((-1, 64), (8, 64)), "float32"),
    ],
)
def test_what_only_bodies_compute(
    op: str, attributes: dict[str, int], dims: tuple[tuple[int, ...], ...], dtype: str
) -> None:
    assert tactics(op, attributes, dims, dtype, 90) == ()
