"""Prompts in, text out: token ids from text or files, and text from token ids while they come."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from moecompiler.errors import UserError

PADDING = -1
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What is needed of a tokenizer; ``size`` is one more than its largest token id."""

    size: int

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with the special tokens the tokenizer puts around it (Mixtral's: ``<s>`` before)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; a replacement character for bytes that are no UTF-8."""


class FastTokenizer:
    """``tokenizer.json``, read by ``tokenizers`` alone: 15 ms, where importing ``transformers`` takes 4 s."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_file(str(path))
        self._backend.no_padding()
        self._backend.no_truncation()
        self.size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids))


class TransformersTokenizer:
    """Whatever else ``AutoTokenizer`` reads (a ``tokenizer.model`` alone, say)."""

    def __init__(self, directory: Path):
        from transformers import AutoTokenizer

        self._backend = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        self.size = max(self._backend.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_tokenizer(directory: Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer in ``directory``, for a model of ``vocab_size`` tokens.

    Raises: UserError where there is none, it cannot be read, or it makes token ids that the model does not have.
    """
    remedy = "give its folder with --tokenizer_dir, or token ids with --input_file (.npy or .csv)"
    if directory is None:
        raise UserError(f"there is no tokenizer beside the engine: {remedy}")
    if not any(directory.glob("tokenizer*")):
        raise UserError(f"{directory}: holds no tokenizer: {remedy}")
    path = directory / "tokenizer.json"
    try:
        tokenizer = FastTokenizer(path) if path.exists() else TransformersTokenizer(directory)
    except Exception as error:  # `tokenizers` raises bare Exception
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{directory}: its tokenizer cannot be read ({first_line}): {remedy}") from None
    if tokenizer.size > vocab_size:
        raise UserError(
            f"{directory}: its tokenizer does not fit: it has {tokenizer.size} tokens, the model only {vocab_size};"
            " give the folder of the model's own with --tokenizer_dir"
        )
    return tokenizer


def read_prompts(
    texts: Sequence[str],
    file: Path | None,
    tokenizer: Callable[[], Tokenizer],
    vocab_size: int,
    pad_id: int | None = None,
) -> list[list[int]]:
    """Token ids of each prompt of ``--input_text`` or ``--input_file``; ``tokenizer`` is called only where there is text.

    A ``.npy`` file holds integers ``[batch, length]`` or ``[length]``, rows padded on the right with -1 or ``pad_id``; a
    ``.csv`` file a row of token ids per prompt; any other file a text prompt per line, in UTF-8.

    Raises: UserError where there is no prompt, one is empty, the file cannot be read, or a token id is not the model's.
    """
    if bool(texts) == (file is not None):
        raise UserError("give prompts with --input_text or with --input_file, one of the two")
    if file is None:
        prompts = _encode(texts, tokenizer, "--input_text")
    elif file.suffix == ".npy":
        prompts = _read_npy(file, pad_id)
    elif file.suffix == ".csv":
        prompts = _read_csv(file)
    else:
        prompts = _encode(_read_lines(file), tokenizer, str(file))
    check_token_ids(prompts, vocab_size, "--input_text" if file is None else str(file))
    return prompts


def check_token_ids(prompts: Sequence[Sequence[int]], vocab_size: int, where: str) -> None:
    """Raises UserError that names the prompt (from 1), where there is none, one is empty, or an id is out of range."""
    if not prompts:
        raise UserError(f"{where}: holds no prompt")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"{where}: prompt {number} is empty")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocab_size:
                raise UserError(f"{where}: prompt {number} holds token id {token}; the model has 0 to {vocab_size - 1}")


def _encode(texts: Sequence[str], tokenizer: Callable[[], Tokenizer], where: str) -> list[list[int]]:
    for number, text in enumerate(texts, 1):
        if not text:  # a tokenizer would make a prompt of special tokens of it
            raise UserError(f"{where}: prompt {number} is empty")
    if not texts:
        return []
    loaded = tokenizer()
    return [loaded.encode(text) for text in texts]


def _read_lines(file: Path) -> list[str]:
    """The lines of a text file without their ends; empty ones at the end of the file do not count."""
    try:
        return file.read_text(encoding="utf-8").rstrip("\n").split("\n") if file.stat().st_size else []
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None


def _read_csv(file: Path) -> list[list[int]]:
    try:
        rows = list(csv.reader(_read_lines(file)))
    except csv.Error as error:
        raise _unreadable(file, error) from None
    prompts: list[list[int]] = []
    for number, row in enumerate(rows, 1):
        while row and not row[-1].strip():  # spreadsheets fill short rows up with empty cells
            row.pop()
        try:
            prompts.append([int(cell) for cell in row])
        except ValueError as error:
            raise UserError(f"{file}: row {number} holds something else than token ids: {error}") from None
    return prompts


def _read_npy(file: Path, pad_id: int | None) -> list[list[int]]:
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        reason = (
            error if "pickle" not in str(error) else "an array of objects, or no array; ragged prompts go into a .csv"
        )
        raise _unreadable(file, reason) from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        found = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise UserError(f"{file}: holds {found}; prompts are integers [batch, length], padded on the right with -1")
    return [_without_padding(row, pad_id) for row in np.atleast_2d(array)]


def _without_padding(row: np.ndarray, pad_id: int | None) -> list[int]:
    tokens: list[int] = row.tolist()
    while tokens and tokens[-1] in (PADDING, pad_id):
        tokens.pop()
    return tokens


def _unreadable(file: Path, reason: object) -> UserError:
    if isinstance(reason, FileNotFoundError):
        return UserError(f"{file}: not found; --input_file takes .txt, .csv or .npy")
    return UserError(f"{file}: cannot be read as {file.suffix or 'text'}: {reason}")


class StreamingDetokenizer:
    """Text of one sequence, as its tokens come; the parts joined are the text that the whole would give.

    A token may hold half a character, and a decoder may drop the space before the first token it is given. So each part is
    the difference of two decodings that start at the same, earlier token, and is held back while it ends in half a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], context: int = 6):
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-context:])  # what was said last, and after it what was not yet said
        self._said = len(self._tokens)

    def add(self, token: int) -> str:
        """The text that ``token`` completes, often a word, sometimes nothing."""
        self._tokens.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back; after the last token."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before, now = self._tokenizer.decode(self._tokens[: self._said]), self._tokenizer.decode(self._tokens)
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not final):
            return ""
        self._tokens = self._tokens[self._said :]
        self._said = len(self._tokens)
        return now[len(before) :]
