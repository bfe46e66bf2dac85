"""Files that a run leaves behind, as TensorRT-LLM's ``examples/run.py`` names them; each is whole or not there."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moecompiler.atomic import replace, temporary_beside
from moecompiler.errors import UserError


def write_tokens_npy(path: Path, sequences: Sequence[Sequence[int]], pad_id: int) -> None:
    """``--output_npy``: int32 ``[batch, length]``, shorter sequences padded on the right with ``pad_id`` (the EOS id).

    TensorRT-LLM's rows hold the prompt and then what was generated. Raises: UserError where it cannot be written.
    """
    tokens = np.full((len(sequences), max(map(len, sequences), default=0)), pad_id, np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    _write(path, "--output_npy", lambda file: np.save(file, tokens))


def write_tokens_csv(path: Path, sequences: Sequence[Sequence[int]]) -> None:
    """``--output_csv``: a row of token ids per sequence, without padding. Raises: UserError where it cannot be written."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(sequences)
    _write(path, "--output_csv", lambda file: file.write(text.getvalue().encode()))


def write_logits_npy(path: Path, logits: np.ndarray) -> None:
    """``--output_logits_npy``: ``logits [batch, output_len, vocab]`` of the generated steps, as float32.

    Raises: UserError where it cannot be written.
    """
    _write(path, "--output_logits_npy", lambda file: np.save(file, logits.astype(np.float32, copy=False)))


def check_writable(path: Path, option: str) -> None:
    """Finds out before anything runs whether a file could be written there, and makes its folder.

    Raises: UserError that names ``option`` where it could not.
    """
    try:
        _prepare(path)
        with temporary_beside(path) as temporary:
            temporary.touch()
            temporary.unlink()
    except OSError as error:
        raise _unwritable(path, option, error) from None


def _write(path: Path, option: str, write: Callable[[BinaryIO], object]) -> None:
    try:
        _prepare(path)
        with temporary_beside(path) as temporary:
            with open(temporary, "wb") as file:
                write(file)
            replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, option, error) from None


def _prepare(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # to replace /dev/null by a file would harm the whole machine
        raise OSError("it is no regular file")


def _unwritable(path: Path, option: str, error: OSError) -> UserError:
    return UserError(f"{option} {path}: cannot be written: {error.strerror or error}")
