"""The real text that engines are measured on."""

from __future__ import annotations

from pathlib import Path

from moecompiler.artifact import Artifact
from moecompiler.errors import UserError
from moecompiler.runtime.prompts import load_tokenizer
from moecompiler.tools.job import Job

_LONGEST = 400_000  # characters; more is never run


def encode_text(artifact: Artifact, text: Path | None, tokenizer_dir: Path | None, notes: list[str]) -> list[int]:
    """Token ids of ``text``, or of the text beside the checkpoint, or of one of Python's own modules. Without a tokenizer and
    without being asked for text: nothing, and a note that says so.

    Raises: UserError where the text cannot be read, or was asked for and there is no tokenizer.
    """
    job = Job.of(artifact)
    own = artifact.directory / "tokenizer"
    directory = tokenizer_dir or (own if own.is_dir() else None)
    if directory is None and text is None:
        notes.append("there is no tokenizer: measured on random tokens only (give --tokenizer_dir)")
        return []
    tokenizer = load_tokenizer(directory, job.model.vocab_size)
    path = text or default_text(job)
    try:
        content = path.read_text(encoding="utf-8")[:_LONGEST]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: cannot be read as text: {error}") from None
    if not content.strip():
        raise UserError(f"--text {path}: is empty")
    return tokenizer.encode(content)


def default_text(job: Job) -> Path:
    """The text beside the checkpoint, or one of Python's own modules."""
    if job.source["kind"] == "hf":
        beside = Path(job.source["model_dir"]) / "heldout.txt"
        if beside.is_file():
            return beside
    import textwrap

    return Path(textwrap.__file__)
