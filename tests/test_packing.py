"""Large weights are packed in bands: the same bytes, whatever their size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from readers import ArrayReader

from moecompiler import packing
from moecompiler.errors import UserError
from moecompiler.packing import bands, pack
from moecompiler.safetensors_file import StoredTensor, read_into
from moecompiler.tools.export import packing_groups
from moecompiler.weights import Piece, Recipe, Shape, joined, materialize, whole

SOURCES = {
    name: np.arange(size, dtype=np.float32).reshape(-1, 6) + i for i, (name, size) in enumerate((("a", 60), ("b", 42)))
}
RECIPES = {
    "joined": joined([whole("a", "float32", (10, 6)), whole("b", "float32", (7, 6))], 0),
    "cut": Recipe("float32", (7, 2), (Piece("a", (2, 3), (7, 2), (0, 0), (0, 1)),)),
    "padded": Recipe("float32", (12, 6), (Piece("a", (0, 0), (10, 6), (0, 0), (0, 1)),)),
    "experts": Recipe(
        "float32",
        (2, 14, 6),
        tuple(
            Piece(n, (0, 0), (7, 6), (e, r, 0), (0, 1, 2))
            for e, r, n in ((0, 0, "a"), (0, 7, "b"), (1, 0, "b"), (1, 7, "a"))
        ),
    ),
    "transposed": whole("a", "float32", (10, 6)).transposed((1, 0)),
    "scalar": Recipe("int64", (), values=(3,)),
}


@pytest.mark.parametrize("nbytes", [1, 50, 100, 10_000])
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "scalar"])
def test_bands_are_the_tensor(name: str, nbytes: int) -> None:
    reader, recipe = ArrayReader(SOURCES), RECIPES[name]
    cut = list(bands(recipe, nbytes))
    np.testing.assert_array_equal(
        np.concatenate([materialize(each, reader).reshape(-1) for each in cut]), materialize(recipe, reader).reshape(-1)
    )
    assert all(each.nbytes <= max(nbytes, 4) for each in cut) or name == "transposed"
    assert (len(cut) == 1) == (name == "transposed" or nbytes >= recipe.nbytes)


def test_a_file_is_the_same_in_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for size in (1 << 20, 40):
        monkeypatch.setattr(packing, "BAND", size)
        digests += pack([(tmp_path / f"{size}.safetensors", RECIPES)], ArrayReader(SOURCES))
    assert digests[0] == digests[1]
    assert (tmp_path / "40.safetensors").read_bytes() == (tmp_path / f"{1 << 20}.safetensors").read_bytes()


class ReadingInto(ArrayReader):
    """Reads every other box to where it goes."""

    def __init__(self) -> None:
        super().__init__(SOURCES)
        self.asked = 0

    def read_into(self, name: str, start: Shape, shape: Shape, out: np.ndarray) -> bool:
        self.asked += 1
        if self.asked % 2 and out.dtype == np.float32:
            out[...] = self.read(name, start, shape)
            return True
        return False


def test_files_side_by_side_are_those_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are more bands of one than of the other, and readers read to where boxes go."""
    monkeypatch.setattr(packing, "BAND", 40)
    tables = [RECIPES, {"down": RECIPES["experts"], "cut": RECIPES["cut"]}]
    sides = {}
    for reader, beside in ((ArrayReader(SOURCES), False), (ReadingInto(), True)):
        parts = [(tmp_path / f"{beside}{index}", table) for index, table in enumerate(tables)]
        sides[beside] = pack(parts, reader, side_by_side=beside), [path.read_bytes() for path, _ in parts]
    assert sides[True] == sides[False]


@pytest.mark.parametrize(
    ("start", "shape"), [((0, 0, 0), (2, 64, 512)), ((1, 3, 0), (1, 60, 512)), ((0, 62, 0), (2, 1, 512))]
)
def test_boxes_are_read_to_where_they_go(
    start: Shape, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecompiler.safetensors_file._LONG", 2048)
    values = np.random.default_rng(0).normal(size=(2, 64, 512)).astype(np.float32)
    (tmp_path / "x").write_bytes(b"before" + values.tobytes())
    tensor = StoredTensor(tmp_path / "x", "x", "float32", values.shape, 6, values.nbytes)
    box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
    out = np.zeros(shape, np.float32)
    assert read_into(tensor, start, shape, out)
    np.testing.assert_array_equal(out, values[box])
    assert not read_into(tensor, (0, 0, 0), (2, 64, 500), np.empty((2, 64, 500), np.float32))  # short runs
    (tmp_path / "x").write_bytes(b"before")
    with pytest.raises(UserError, match="x cannot be read from it any more: it ends at byte 6"):
        read_into(tensor, (0, 0, 0), shape, out)


@pytest.mark.parametrize(
    ("stages", "workers", "groups"),
    [
        ([range(8)], 1, [tuple(range(8))]),
        ([range(8)], 3, [(0, 1, 2), (3, 4, 5), (6, 7)]),
        ([range(2), range(2, 4)], 2, [(0, 1), (2, 3)]),
        ([[1]], 4, [(1,)]),
        ([], 2, []),
    ],
)
def test_ranks_of_a_stage_are_packed_together(
    stages: list[Sequence[int]], workers: int, groups: list[tuple[int, ...]]
) -> None:
    assert packing_groups(stages, workers) == groups
