"""Large weights are packed in bands: the same bytes, whatever their size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from readers import ArrayReader

from moecompiler import packing
from moecompiler.packing import bands, pack
from moecompiler.weights import Piece, Recipe, joined, materialize, whole

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
        np.concatenate([materialize(each, reader) for each in cut]), materialize(recipe, reader)
    )
    row = recipe.nbytes // recipe.shape[0]
    assert all(each.nbytes <= max(nbytes, row) for each in cut) or name == "transposed"
    assert (len(cut) == 1) == (name == "transposed" or nbytes >= recipe.nbytes)


def test_a_file_is_the_same_in_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for size in (1 << 20, 40):
        monkeypatch.setattr(packing, "BAND", size)
        digests += pack([(tmp_path / f"{size}.safetensors", RECIPES)], ArrayReader(SOURCES))
    assert digests[0] == digests[1]
    assert (tmp_path / "40.safetensors").read_bytes() == (tmp_path / f"{1 << 20}.safetensors").read_bytes()
