from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecompiler.errors import UserError
from moecompiler.runtime.outputs import check_writable, write_logits_npy, write_tokens_csv, write_tokens_npy
from moecompiler.runtime.prompts import Tokenizer, read_prompts

SEQUENCES = [[5, 6, 7], [8], [9, 1]]


def no_tokenizer() -> Tokenizer:
    raise AssertionError("there is no text to encode")


def test_tokens_npy(tmp_path: Path) -> None:
    path = tmp_path / "made" / "for it" / "tokens"
    write_tokens_npy(path, SEQUENCES, pad_id=2)
    tokens = np.load(path)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[5, 6, 7], [8, 2, 2], [9, 1, 2]]
    assert [file.name for file in path.parent.iterdir()] == ["tokens"]


def test_tokens_csv(tmp_path: Path) -> None:
    path = tmp_path / "tokens.csv"
    write_tokens_csv(path, SEQUENCES)
    assert path.read_bytes() == b"5,6,7\n8\n9,1\n"


def test_what_is_written_can_be_read_as_prompts(tmp_path: Path) -> None:
    write_tokens_csv(tmp_path / "t.csv", SEQUENCES)
    write_tokens_npy(tmp_path / "t.npy", SEQUENCES, pad_id=2)
    assert read_prompts([], tmp_path / "t.csv", no_tokenizer, 10) == SEQUENCES
    assert read_prompts([], tmp_path / "t.npy", no_tokenizer, 10, pad_id=2) == SEQUENCES


def test_logits_npy(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).standard_normal((2, 3, 5))
    write_logits_npy(tmp_path / "l.npy", logits)
    loaded = np.load(tmp_path / "l.npy")
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, logits.astype(np.float32))


WRITERS: dict[str, Callable[[Path], None]] = {
    "--output_npy": lambda path: write_tokens_npy(path, SEQUENCES, 0),
    "--output_csv": lambda path: write_tokens_csv(path, SEQUENCES),
    "--output_logits_npy": lambda path: write_logits_npy(path, np.zeros((1, 1, 1))),
}


@pytest.mark.parametrize("option", WRITERS)
def test_where_nothing_can_be_written(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder", Path("/dev/null")):
        for write in (WRITERS[option], lambda path: check_writable(path, option)):
            with pytest.raises(UserError, match=f"{option} {path}: cannot be written: ") as caught:
                write(path)
            assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens.npy"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(UserError, match="No space left on device"):
        write_tokens_npy(path, SEQUENCES, 0)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("tokens.npy", "old")]


def test_checking_leaves_nothing_but_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokens.npy"
    check_writable(path, "--output_npy")
    assert path.parent.is_dir()
    assert not list(path.parent.iterdir())
