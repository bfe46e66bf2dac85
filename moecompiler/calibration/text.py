"""Texts to calibrate on: the package's own, a file, a folder, or a data set that Hugging Face's ``datasets`` has saved.

The package's own texts were written for this project, or are parts of its documentation and code, under its licence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import islice
from pathlib import Path

from moecompiler.errors import UserError

COLUMNS = ("text", "article", "content")  # where data sets have their text; the first that is there
SPLITS = ("train", "validation", "test")
_TABLES = (".arrow", ".parquet")


def default_documents() -> list[str]:
    """The texts that ship with the package."""
    folder = resources.files("moecompiler.calibration") / "texts"
    return [path.read_text(encoding="utf-8") for path in sorted(folder.iterdir(), key=lambda path: path.name)]


def read_documents(path: Path, most: int, longest: int) -> list[str]:
    """The first ``most`` documents of a text file, a ``.jsonl`` (a string under ``"text"`` in each line), a folder of such files,
    or a folder of Arrow or Parquet files; of each, the first ``longest`` characters. Those of white space do not count.

    Raises: UserError where there is no such file, it is no text, or holds none.
    """
    if not path.exists():
        raise UserError(f"{path}: not found; give a text, a .jsonl, or a folder with such files or a saved data set")
    try:
        documents = list(islice((text[:longest] for text in _documents(path, longest) if text.strip()), most))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text in UTF-8: {error}") from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None
    if not documents:
        raise UserError(f"{path}: holds no text; give some to calibrate on")
    return documents


def _documents(path: Path, longest: int) -> Iterator[str]:
    if path.is_file():
        yield from _file(path, longest)
        return
    files = sorted(each for each in path.rglob("*") if each.is_file())
    tables = [each for each in files if each.suffix in _TABLES]
    if tables:
        yield from _rows(_one_split(path, tables))
        return
    texts = [each for each in files if each.suffix in (".txt", ".jsonl")]
    if not texts:
        raise UserError(f"{path}: holds no .txt, .jsonl, .arrow or .parquet file")
    for each in texts:
        yield from _file(each, longest)


def _file(path: Path, longest: int) -> Iterator[str]:
    if path.suffix in _TABLES:
        yield from _rows([path])
        return
    with path.open(encoding="utf-8") as file:
        if path.suffix != ".jsonl":
            text = file.read(longest)
            if "\0" in text:
                raise UserError(f"{path}: is not text: it holds NUL characters")
            yield text
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _text_of(line, f"{path}: line {number}")


def _text_of(line: str, where: str) -> str:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("text"), str):
        raise UserError(f'{where}: holds no string under "text"')
    return data["text"]


def _one_split(folder: Path, tables: list[Path]) -> list[Path]:
    """The files of the training split where the data set has several, each in a folder or with its name in front
    (``train-00000-of-00002.parquet``)."""

    def is_of(split: str, path: Path) -> bool:
        first = path.relative_to(folder).parts
        return split in first[:-1] or path.name.startswith(f"{split}-")

    for split in SPLITS:
        if mine := [path for path in tables if is_of(split, path)]:
            return mine
    return tables


def _rows(tables: Iterable[Path]) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise UserError(
            f"{next(iter(tables))}: needs pyarrow to be read: pip install pyarrow, or give the text as .jsonl"
        ) from None
    for path in tables:
        try:
            if path.suffix == ".parquet":
                file = parquet.ParquetFile(path)
                names, batches = file.schema_arrow.names, file.iter_batches()
            else:
                stream = ipc.open_stream(pyarrow.memory_map(str(path)))
                names, batches = stream.schema.names, stream
            column = next((each for each in COLUMNS if each in names), None)
            if column is None:
                raise UserError(f"{path}: has the columns {', '.join(names)}; none is called {', '.join(COLUMNS)}")
            for batch in batches:
                for value in batch.column(names.index(column)).to_pylist():
                    if not isinstance(value, str):
                        raise UserError(f"{path}: column {column} holds {type(value).__name__}, not text")
                    yield value
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())}") from None
