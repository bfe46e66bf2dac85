"""The kernels of sampling in an engine's file: compiled once, refused when another version made them, launched as planned."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from moecompiler.backends.sampling_kernels import SamplingBuffers
from moecompiler.errors import UserError
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.plugins.sampling import kept, launch

LIBRARY = TensorRTPlugins()
BUFFERS = SamplingBuffers(3, 40, 5, 100, 200, 300, 400, 500, 600, 700, 800, 10_000)


@pytest.fixture(scope="module")
def data() -> bytes:
    compiled = LIBRARY.compile_sampling(1536, "float16", 90)
    assert compiled is not None
    return compiled


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """No GPU: what would have been launched."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(kept, "load", lambda cubin, kernel: kernel.function)
    monkeypatch.setattr(kept, "run", lambda *args: calls.append(args))
    return calls


def test_launches(data: bytes, launched: list[tuple[Any, ...]]) -> None:
    sampling = LIBRARY.load_sampling(data)
    assert sampling.workspace(5) > sampling.workspace(3) > 3 * 1536 * 16
    for greedy in (True, False):
        sampling.enqueue(greedy, BUFFERS, 7)
    (few, _, read, written, workspace, scratch, stream), (many, launches, *_) = launched
    assert (few, many) == (("highest", "choose_highest"), ("scale", "weigh", "choose"))
    assert (read, written, workspace, stream) == ((100, 200, 300, 400, 500, 600), (700, 800), 10_000, 7)
    assert scratch > workspace
    assert [each.grid for each in launches] == [(3, 2, 1), (3, 2, 1), (3, 1, 1)]
    assert launches[-1].args[-2:] == (40, 5)


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_arguments_come_in_the_kernels_order(name: str) -> None:
    """A launch has no names for them."""
    for kernel in launch.SamplingTactic(name, 1536, "float16").kernels:
        names = getattr(importlib.import_module(kernel.module), kernel.function).arg_names
        assert [name for name in names if name not in dict(kernel.constants)] == [name for name, _ in kernel.signature]


def test_no_kernels() -> None:
    assert LIBRARY.compile_sampling(1536, "float64", 90) is None


def test_another_versions(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PART", 512)
    with pytest.raises(UserError, match="made by another version of moecompiler: build it anew"):
        LIBRARY.load_sampling(data)


@pytest.mark.parametrize("end", [0, 40, -10])
def test_damaged(end: int, data: bytes) -> None:
    with pytest.raises(UserError, match="are damaged: build it anew"):
        LIBRARY.load_sampling(data[:end])
