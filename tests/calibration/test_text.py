"""Texts and how samples are cut from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moecompiler.calibration.samples import bytes_as_tokens, check_sizes, cut_samples
from moecompiler.calibration.text import default_documents, read_documents
from moecompiler.errors import UserError

HELD_OUT = Path(__file__).parent.parent / "data" / "tiny-mixtral" / "heldout.txt"


def read(path: Path, most: int = 100, longest: int = 1000) -> list[str]:
    return read_documents(path, most, longest)


def test_the_packages_own_text_is_none_that_models_are_measured_on() -> None:
    documents = default_documents()
    assert len(documents) >= 5
    assert sum(map(len, documents)) > 50_000
    lines = {line.strip() for text in documents for line in text.splitlines() if len(line.strip()) > 30}
    held_out = {line.strip() for line in HELD_OUT.read_text(encoding="utf-8").splitlines()}
    assert len(held_out) > 1000
    assert not lines & held_out


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Grüße\n", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    rows = [{"text": "one"}, {"text": " \n"}, {"text": "two", "more": 1}]
    (tmp_path / "deep" / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "README.md").write_text("not looked at")
    assert read(tmp_path / "b.txt") == ["Grüße\n"]
    assert read(tmp_path) == ["Grüße\n", "one", "two"]
    assert read(tmp_path, most=2, longest=3) == ["Grü", "one"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "a.txt: holds no text; give some to calibrate on"),
        ("a.txt", b" \n\t\n", "a.txt: holds no text; give some to calibrate on"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", "a.txt: is not text in UTF-8"),
        ("a.bin", b"\0\0\0\0", "a.bin: is not text: it holds NUL characters"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', 'a.jsonl: line 2: holds no string under "text"'),
        ("a.jsonl", b"text\n", "a.jsonl: line 1: is no JSON"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read(tmp_path / name)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.txt, \.jsonl, \.arrow or \.parquet file"):
        read(tmp_path)
    with pytest.raises(UserError, match="not found"):
        read(tmp_path / "x")


def test_data_sets_need_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "data-00000-of-00001.arrow").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow: needs pyarrow to be read: pip install pyarrow"):
        read(tmp_path)


def test_data_sets(tmp_path: Path) -> None:
    """As ``save_to_disk`` leaves them, and as they lie on the hub; the training split."""
    pyarrow = pytest.importorskip("pyarrow", reason="an optional package, which only reading data sets needs")
    from pyarrow import parquet

    for split in ("test", "train"):
        table = pyarrow.table({"id": [1, 2, 3], "text": [f"{split} one", "", f"{split} two"]})
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        (tmp_path / "hub").mkdir(exist_ok=True)
        parquet.write_table(
            table.rename_columns(["id", "article"]), tmp_path / "hub" / f"{split}-00000-of-00001.parquet"
        )
    for form in ("saved", "hub"):
        assert read(tmp_path / form) == ["train one", "train two"]
        assert read(tmp_path / form, most=1) == ["train one"]
    parquet.write_table(pyarrow.table({"label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has the columns label; none is called text, article, content"):
        read(tmp_path / "x.parquet")
    (tmp_path / "y.arrow").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read as arrow"):
        read(tmp_path / "y.arrow")


def test_samples_are_of_all_documents() -> None:
    def letters(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    documents = ["abcdefg", "hi", "jklmn"]
    cut = [[ord(letter) for letter in part] for part in ("abc", "hi", "jkl", "def", "mn", "g")]
    assert cut_samples(documents, letters, 100, 3) == cut
    assert cut_samples(documents, letters, 4, 3) == cut[:4]
    assert cut_samples(documents, letters, 2, 3) == cut[:2]
    with pytest.raises(UserError, match="gives no token"):
        cut_samples(documents, lambda text: [], 4, 3)
    assert bytes_as_tokens(100)("é") == [0xC3 % 100, 0xA9 % 100]


def test_sizes() -> None:
    check_sizes(1, 128, 128)
    for size, length, said in ((0, 1, "--calib_size 0"), (1, 0, "--calib_max_seq_length 0"), (1, 129, "give 1 to 128")):
        with pytest.raises(UserError, match=said):
            check_sizes(size, length, 128)
