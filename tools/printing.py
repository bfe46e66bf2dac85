"""How generated text, figures and errors are printed."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from moecompiler.runtime.prompts import StreamingDetokenizer, Tokenizer

USER_ERROR = 2  # the exit status where what was asked for cannot be done


def complaint(message: str) -> str:
    """The one line that says what is wrong."""
    return f"moecompiler: error: {' '.join(message.split())}"


class TextPrinter:
    """Prints prompts and what follows them to stdout: one prompt's text as it comes, several prompts' each when it is whole.

    Without a tokenizer (the input was token ids) it prints the ids.
    """

    def __init__(self, prompts: list[list[int]], tokenizer: Tokenizer | None):
        self._prompts, self._tokenizer = prompts, tokenizer
        self._streams = [StreamingDetokenizer(tokenizer, prompt) for prompt in prompts] if tokenizer else []
        self._parts: list[list[str]] = [[] for _ in prompts]
        if len(prompts) == 1:
            self._write(tokenizer.decode(prompts[0]) if tokenizer else "")

    def show(self, step: int, tokens: dict[int, int]) -> None:
        """The new token of each prompt; see ``generation.OnTokens``."""
        for index, token in tokens.items():
            self._parts[index].append(self._streams[index].add(token) if self._streams else f"{token} ")
        if len(self._prompts) == 1:
            self._write(self._parts[0][-1])

    def finish(self) -> None:
        """The rest, after the last token."""
        for parts, stream in zip(self._parts, self._streams, strict=False):
            parts.append(stream.finish())
        if len(self._prompts) == 1:
            self._write((self._parts[0][-1] if self._streams else "") + "\n")
            return
        for index, (prompt, parts) in enumerate(zip(self._prompts, self._parts, strict=True)):
            text = self._tokenizer.decode(prompt) if self._tokenizer else ""
            self._write(f"--- prompt {index} ---\n{text}{''.join(parts)}\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def summary_line(summary: dict[str, Any]) -> str:
    """One line of what ``run.summary`` holds."""
    return (
        f"{summary['prompts']} prompt(s), {summary['output_tokens']} tokens:"
        f" first token after {summary['time_to_first_token_s'] * 1e3:.1f} ms,"
        f" {summary['decode_tokens_per_s']:.1f} tokens/s after it"
    )


def wide_console() -> Console:
    """Stdout, for tables of many columns: what is no terminal, or a narrow one, gets lines of 120 characters all the same."""
    console = Console(highlight=False)
    return Console(highlight=False, width=max(console.width, 120))
