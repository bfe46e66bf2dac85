"""Token ids to calibrate on, cut from documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice, zip_longest

from moecompiler.errors import UserError

LONGEST_TOKEN = 16  # characters of a document that are looked at for each token that is wanted of it


def cut_samples(
    documents: Sequence[str], encode: Callable[[str], list[int]], size: int, length: int
) -> list[list[int]]:
    """At most ``size`` samples of at most ``length`` tokens: the beginnings of all documents, then what comes next in each, and
    so on.

    Raises: UserError where there is not one token.
    """
    windows = []
    for document in documents[:size]:
        ids = encode(document)
        windows.append([ids[at : at + length] for at in range(0, len(ids), length)])
    columns = (window for column in zip_longest(*windows) for window in column if window)
    samples = list(islice(columns, size))
    if not samples:
        raise UserError("the calibration text gives no token; give another --calib_dataset")
    return samples


def check_sizes(size: int, length: int, longest: int) -> None:
    """Raises UserError where ``--calib_size`` or ``--calib_max_seq_length`` cannot be; ``longest``: the model's positions."""
    if size < 1:
        raise UserError(f"--calib_size {size}: give 1 or more samples")
    if not 1 <= length <= longest:
        raise UserError(f"--calib_max_seq_length {length}: give 1 to {longest}, the model's max_position_embeddings")


def bytes_as_tokens(vocab_size: int) -> Callable[[str], list[int]]:
    """A stand-in for the tokenizer that dummy weights do not have: a token for each byte of UTF-8."""
    return lambda text: [byte % vocab_size for byte in text.encode()]
