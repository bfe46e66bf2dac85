"""The files of a report."""

from __future__ import annotations

from pathlib import Path

from moecompiler.atomic import json_text, write_text_atomic
from moecompiler.comparison.report.markdown import markdown
from moecompiler.comparison.report.page import render
from moecompiler.comparison.result import Result
from moecompiler.errors import UserError

JSON, MARKDOWN, PAGE = "result.json", "report.md", "report.html"


def write_report(result: Result, directory: Path) -> Path:
    """Writes ``result.json``, ``report.md`` and ``report.html`` into ``directory``, which is made where it is not there; each
    file is there whole or not at all. The page's path.

    Raises: UserError where they cannot be written.
    """
    return write_files(directory, {JSON: json_text(result.to_json()), MARKDOWN: markdown(result), PAGE: render(result)})


def write_files(directory: Path, texts: dict[str, str]) -> Path:
    """Files by name, in this order; the last one's path. Raises: UserError."""
    path = directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            path = directory / name
            write_text_atomic(path, text)
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written: {error.strerror or error}") from None
    return path
