"""Kernels of collectives as an engine's file: from compiling to launching, and files that are not right."""

from __future__ import annotations

from typing import Any

import pytest

from moecompiler.errors import UserError
from moecompiler.plugins.collectives import kept
from moecompiler.plugins.collectives.launch import USUAL, Sizes, all_gather, all_reduce, norm_fits, one_shot_bytes
from moecompiler.plugins.launch import Cubin, CudaKernel
from moecompiler.runtime.collective_kernels import Region

FOUR = Region(4096, 4, 33)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A file, its kernels compiled to their names."""
    from moecompiler.plugins import compile as compiling

    def compiled(kernel: CudaKernel, sm: int) -> Cubin:
        return Cubin(f"{kernel.function} {sm}".encode(), kernel.function, kernel.shared, kernel.num_warps, 0)

    monkeypatch.setattr(compiling, "compile_kernel", compiled)
    return kept.compile_collectives("bfloat16", 90)


def test_from_file_to_launch(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled; a message takes the kernel for its size."""
    launched: list[tuple[bytes, Any]] = []
    loaded: list[bytes] = []
    monkeypatch.setattr(kept, "load", lambda cubin, kernel: cubin.image)
    monkeypatch.setattr(kept, "load_now", loaded.append)
    monkeypatch.setattr(
        kept, "run", lambda functions, launches, *rest: launched.append((functions[0], launches[0].args, rest[-1]))
    )
    kernels = kept.Collectives(data)
    assert loaded == [f"{name} 90".encode() for name in ("one_shot", "two_shot", "gather", "one_shot_norm")]
    assert (kernels.dtype, kernels.region_bytes) == ("bfloat16", USUAL.region)
    kernels.all_reduce(16, 32, 4096, FOUR, 7)
    kernels.all_reduce(16, 32, 1 << 20, FOUR, 7)
    kernels.all_gather(16, 32, 2, 100, FOUR, 7)
    assert kernels.norm_fits(1, 4096, FOUR)
    kernels.all_reduce_add_rms_norm((1, 2, 3), (4, 5), 1, 4096, 1e-5, FOUR, 7)
    assert launched == [
        (b"one_shot 90", (16, 32, 4096, 4096), 7),
        (b"two_shot 90", (16, 32, 4096, 1 << 20), 7),
        (b"gather 90", (16, 32, 4096, 2, 25, 25, 8), 7),
        (b"one_shot_norm 90", (1, 2, 3, 4, 5, 4096, 1, 4096, 1e-5), 7),
    ]
    launched.clear()
    kept.Collectives(data, 0).all_reduce(16, 32, 4096, FOUR, 7)
    assert launched[0][0] == b"two_shot 90"


def test_files_that_are_not_right(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for damaged in (data[:40], data[:-9], data.replace(b'"threads"', b'"thread"')):
        with pytest.raises(UserError, match="kernels for collectives are damaged: build it anew"):
            kept.Collectives(damaged)
    other = data.replace(b"bfloat16", b"float16", 1)
    with pytest.raises(UserError, match="made by another version of moecompiler: build it anew"):
        kept.Collectives(other)


@pytest.mark.parametrize(("ranks", "most"), [(2, 512 << 10), (3, 256 << 10), (4, 256 << 10), (8, 128 << 10)])
def test_where_two_shots_are_faster(ranks: int, most: int) -> None:
    region = Region(0, ranks, 132)
    assert one_shot_bytes(ranks, USUAL) == most
    for elements, name in ((most // 2, "one_shot"), (most // 2 + 1, "two_shot")):
        assert [kernel for kernel, _ in all_reduce(0, 0, elements, "float16", region, USUAL)] == [name]
    assert norm_fits(most // 8192, 4096, "float16", region, USUAL)
    assert not norm_fits(most // 8192 + 1, 4096, "float16", region, USUAL)
    assert not norm_fits(1, 4097, "float16", region, USUAL)
    assert not norm_fits(1, 65536, "float16", region, USUAL)


def test_pieces() -> None:
    """They follow one another, cover all, and fit; none for nothing."""
    sizes = Sizes(slot=4096)
    pieces = list(all_reduce(0, 1 << 20, 5000, "float32", FOUR, sizes, most_once=0))
    assert [launch.args for _, launch in pieces] == [
        (at * 4, (1 << 20) + at * 4, 4096, min(1024, 5000 - at)) for at in range(0, 5000, 1024)
    ]
    assert (
        list(all_reduce(0, 0, 0, "float32", FOUR, sizes)) == list(all_gather(0, 0, 0, 5, "float32", FOUR, sizes)) == []
    )
    covered = set()
    for _, launch in all_gather(0, 0, 3, 1000, "float32", FOUR, sizes):
        source, target, _, rows, width, pitch, unit = launch.args
        assert (pitch * unit, unit) == (4000, 16)
        assert rows * width * unit <= sizes.gathered
        row, column = divmod(source, 4000)
        assert target == row * 16000 + column
        covered |= {(row + r, column + c * unit) for r in range(rows) for c in range(width)}
    assert covered == {(row, column) for row in range(3) for column in range(0, 4000, 16)}
