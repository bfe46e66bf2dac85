"""Safetensors files: what ours writes the package reads, what the package writes ours reads, and what is broken is said."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecompiler import safetensors_writing
from moecompiler.errors import UserError
from moecompiler.safetensors_file import StoredTensor, layout, map_tensor, numpy_dtype, read_ahead, read_header
from moecompiler.safetensors_writing import write

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


def some_values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape)
    return (np.arange(count) % 7 - (0 if dtype in ("uint8", "bool") else 3)).astype(numpy_dtype(dtype)).reshape(shape)


def as_torch(value: np.ndarray, dtype: str) -> torch.Tensor:
    """By way of the bytes: torch takes no arrays of ml_dtypes' types."""
    tensor = torch.empty(value.shape, dtype=TORCH_DTYPES[dtype])
    if value.size:
        tensor.view(-1).view(torch.uint8)[:] = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
    return tensor


def put_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_reads_what_the_package_writes(tmp_path: Path, dtype: str) -> None:
    values = {"a": some_values(dtype, (3, 5)), "scalar": some_values(dtype, ()), "none": some_values(dtype, (0, 4))}
    tensors = {name: as_torch(value, dtype) for name, value in values.items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = read_header(tmp_path / "x.safetensors")
    assert stored.keys() == values.keys()
    for name, value in values.items():
        assert (stored[name].dtype, stored[name].shape, stored[name].nbytes) == (dtype, value.shape, value.nbytes)
        found = map_tensor(stored[name])
        assert found.dtype == value.dtype
        assert not isinstance(found, np.memmap)
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_the_package_reads_what_is_written(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    values = {"odd": some_values(dtype, (3, 5)), "even": some_values(dtype, (16, 8)), "ä": some_values(dtype, (1,))}
    written: list[int] = []
    digest = write(
        path, {n: (dtype, v.shape) for n, v in values.items()}, values.__getitem__, written.append, {"made by": "test"}
    )
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"made by": "test"}
        assert set(file.keys()) == values.keys()
        for name, value in values.items():
            found = file.get_tensor(name)
            assert found.dtype == TORCH_DTYPES[dtype]
            assert tuple(found.shape) == value.shape
            assert found.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == value.tobytes()
    assert {name: map_tensor(t).tobytes() for name, t in read_header(path).items()} == {
        name: value.tobytes() for name, value in values.items()
    }
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(written) == path.stat().st_size


@given(
    st.dictionaries(
        st.text(max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 40), max_size=3).map(tuple)),
        max_size=8,
    )
)
def test_layout_is_gapless_and_aligned(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    header, offsets, total = layout(tensors)
    nbytes = {name: math.prod(shape) * numpy_dtype(dtype).itemsize for name, (dtype, shape) in tensors.items()}
    assert len(header) % 4096 == 0
    assert list(offsets) == sorted(offsets, key=lambda name: nbytes[name] % 64 != 0) or not offsets
    at = len(header)
    for name, offset in offsets.items():
        assert offset == at
        assert offset % (64 if nbytes[name] % 64 == 0 else numpy_dtype(tensors[name][0]).itemsize) == 0
        at += nbytes[name]
    assert total == at
    assert {name for name, _ in safetensors.deserialize(header + bytes(total - len(header)))} == set(tensors)


def test_layout_keeps_the_given_order_of_the_aligned() -> None:
    tensors = {"b": ("float32", (16,)), "odd": ("float16", (3,)), "a": ("float32", (32,)), "wide": ("float32", (3,))}
    assert list(layout(tensors)[1]) == ["b", "a", "wide", "odd"]


def test_packed_types_need_whole_bytes() -> None:
    assert layout({"x": ("float4_e2m1fn", (2, 32))})[2] == 4096 + 32
    with pytest.raises(ValueError, match="does not fill whole bytes"):
        layout({"x": ("float4_e2m1fn", (3,))})
    with pytest.raises(ValueError, match="packed"):
        numpy_dtype("float4_e2m1fn")


def test_write_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def produce(name: str) -> np.ndarray:
        assert all(ref() is None for ref in alive)
        array = np.full((1000,), float(name), np.float32)
        alive.append(weakref.ref(array))
        return array

    gc.disable()
    try:
        write(tmp_path / "x", {str(i): ("float32", (1000,)) for i in range(4)}, produce)
    finally:
        gc.enable()
    assert len(alive) == 4


def test_write_takes_any_strides(tmp_path: Path) -> None:
    array = some_values("bfloat16", (6, 4)).T
    write(tmp_path / "x", {"x": ("bfloat16", (4, 6))}, lambda name: array)
    np.testing.assert_array_equal(map_tensor(read_header(tmp_path / "x")["x"]), array)


def test_progress_comes_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_writing, "CHUNK", 1000)
    written: list[int] = []
    array = some_values("float32", (1024,))
    digest = write(tmp_path / "x", {"x": ("float32", (1024,))}, lambda name: array, written.append)
    assert max(written) == 1000
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.float16), np.zeros((3, 2), np.float32)])
def test_write_refuses_what_was_not_announced(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="x: produced"):
        write(tmp_path / "x", {"x": ("float32", (2, 3))}, lambda name: array)


@pytest.mark.parametrize("target", ["no/such/folder", ".", "/dev/full"])
def test_write_says_where_it_cannot(tmp_path: Path, target: str) -> None:
    if target == "/dev/full" and not Path(target).exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match=r"cannot be written: (No such file|Is a directory|No space left)"):
        write(tmp_path / target, {"x": ("float32", (1,))}, lambda name: np.zeros(1, np.float32))


F32 = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": F32}, b"1234567", r"truncated: a ends at byte \d+, the file at \d+; download"),
        ({"a": F32}, b"123456789", "1 bytes after a belong to no tensor"),
        ({}, b"1", "1 bytes after the header belong to no tensor"),
        ({"a": F32, "b": entry("F32", [2], 4, 12)}, bytes(12), "b overlaps a"),
        ({"a": F32, "b": F32}, bytes(8), "overlaps"),
        ({"a": F32, "b": entry("F32", [2], 12, 20)}, bytes(20), "4 bytes before b belong to no tensor"),
        ({"a": entry("F32", [2], 4, 12)}, bytes(12), "4 bytes before a belong"),
        ({"a": entry("F32", [3], 0, 8)}, bytes(8), r"a takes 8 bytes, but F32 \[3\] needs 12 bytes"),
        ({"a": entry("F7", [2], 0, 8)}, bytes(8), "a has the unknown dtype 'F7'; known are .*BF16"),
        ({"a": entry("F32", [-2], 0, 8)}, bytes(8), r"the shape \[-2\]"),
        ({"a": entry("F32", [True, 2], 0, 8)}, bytes(8), "the shape"),
        ({"a": entry("F32", [2.0], 0, 8)}, bytes(8), "the shape"),  # type: ignore[list-item]
        ({"a": entry("F32", [2], 8, 0)}, bytes(8), r"the data_offsets \[8, 0\]"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, bytes(8), r"the data_offsets \[8\]"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "a has no dtype, shape and data_offsets"),
        ({"a": 3}, b"", "a has no dtype, shape and data_offsets"),
        ({"__metadata__": 3}, b"", "__metadata__ is int"),
        ([1], b"", "broken header: it is list, not an object"),
        (b"{nonsense}", b"", "not the JSON of a safetensors file"),
        (b"\xff\xfe", b"", "not the JSON of a safetensors file"),
        (b"[" * 100_000, b"", "not the JSON of a safetensors file"),
        (b'{"a": 1, "a": 2}', b"", "'a' occurs twice"),
    ],
)
def test_broken_files(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = put_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UserError, match=f"x.safetensors: .*{message}") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("length", "message"),
    [(100, "truncated: 10 bytes do not hold its header"), (2**60, "claims a header of 1152921504606846976 bytes")],
)
def test_broken_length(tmp_path: Path, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_header(put_file(tmp_path / "x", b"{}", length=length))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_shorter_than_its_length_field(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=f"truncated: {len(content)} bytes"):
        read_header(tmp_path / "x")


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: cannot be read: No such file"):
        read_header(tmp_path / "gone")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


def test_mapping_a_file_that_shrank_or_went(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, {"x": ("float32", (4096,))}, lambda name: np.zeros(4096, np.float32))
    stored = read_header(path)["x"]
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match="x cannot be read from it any more"):
        map_tensor(stored)
    path.unlink()
    with pytest.raises(UserError, match="x cannot be read from it any more"):
        map_tensor(stored)


def test_mapped_tensors_are_read_only(tmp_path: Path) -> None:
    write(tmp_path / "x", {"x": ("float32", (4,))}, lambda name: np.zeros(4, np.float32))
    array = map_tensor(read_header(tmp_path / "x")["x"])
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_misaligned_tensors_are_read(tmp_path: Path) -> None:
    """The format does not ask for alignment; files by other writers have none."""
    value = np.arange(3, dtype=np.float32)
    header = {"byte": entry("U8", [1], 0, 1), "x": entry("F32", [3], 1, 13)}
    stored = read_header(put_file(tmp_path / "x", header, b"\0" + value.tobytes()))
    np.testing.assert_array_equal(map_tensor(stored["x"]), value)


def test_stored_tensor_is_found_by_its_offset(tmp_path: Path) -> None:
    value = some_values("bfloat16", (8, 8))
    write(tmp_path / "x", {"x": ("bfloat16", (8, 8))}, lambda name: value)
    stored = read_header(tmp_path / "x")["x"]
    assert stored == StoredTensor(tmp_path / "x", "x", "bfloat16", (8, 8), 4096, 128)
    raw = (tmp_path / "x").read_bytes()[stored.offset :][: stored.nbytes]
    np.testing.assert_array_equal(np.frombuffer(raw, ml_dtypes.bfloat16).reshape(8, 8), value)


def test_what_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes from the box's first to its last element; nothing where most of them are not wanted."""
    write(tmp_path / "x.safetensors", {"x": ("float16", (64, 100))}, lambda _: np.zeros((64, 100), np.float16))
    stored = read_header(tmp_path / "x.safetensors")["x"]
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda _, at, count, advice: asked.append((at - stored.offset, count)))
    for start, shape in (((0, 0), (64, 100)), ((3, 10), (2, 50)), ((0, 0), (64, 1)), ((0, 0), (0, 100))):
        read_ahead(stored, start, shape)
    assert asked == [(0, 12800), (2 * 310, 2 * 150)]
