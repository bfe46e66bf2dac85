"""What ``compare`` is asked for, and the text that it is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moecompiler.artifact import Artifact
from moecompiler.backends.base import EngineLimits
from moecompiler.comparison.result import LEVELS
from moecompiler.errors import UserError
from moecompiler.plugin_switches import FAMILIES
from moecompiler.runtime.prompts import load_tokenizer
from moecompiler.tools.job import Job
from moecompiler.tools.text import default_text, encode_text
from moecompiler.validation.scenario import Scenario

FAIL_ON = (*LEVELS, "any", "none")


@dataclass(frozen=True)
class Request:
    """``layers``, as ``layers_text`` says them, and ``ops``: of the op level, None: all. ``tokens``: about how many are run;
    ``prompts`` texts of ``output_len`` tokens are continued greedily. ``replay``: whether routing is replayed. ``threads``:
    of the CPU, 0: as many as there are."""

    levels: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_text: str | None
    ops: tuple[str, ...] | None
    text: Path | None
    tokenizer_dir: Path | None
    tokens: int
    seed: int
    prompts: int
    output_len: int
    replay: bool
    threads: int
    work_dir: Path


@dataclass(frozen=True)
class Text:
    """``ids``: of the text, empty without a tokenizer; ``spoken``: a token's text; ``source``: where it is from."""

    ids: tuple[int, ...]
    spoken: Callable[[int], str]
    source: str


def parse_levels(text: str) -> tuple[str, ...]:
    """Raises: UserError where a name is no level's."""
    return _chosen("--level", text, LEVELS)


def parse_fail_on(text: str) -> tuple[str, ...]:
    """The levels whose checks decide. Raises: UserError where a name is no level's."""
    names = _chosen("--fail_on", text, FAIL_ON)
    if "none" in names:
        return ()
    return LEVELS if "any" in names else names


def parse_ops(text: str | None) -> tuple[str, ...] | None:
    """Families, as ``--plugins`` calls them, or ops, in lower case. Raises: UserError where one is no op's."""
    if text is None:
        return None
    known = {*FAMILIES, *(name.lower() for names in FAMILIES.values() for name in names)}
    names = tuple(each.strip().lower() for each in text.split(",") if each.strip())
    for name in names:
        if name not in known and not name.startswith(tuple(known)):
            raise UserError(f"--ops: there is no op {name!r}; choose from {', '.join(FAMILIES)}")
    return names


def parse_layers(text: str | None, count: int) -> tuple[int, ...] | None:
    """``0,3`` or ``0-3``. Raises: UserError where the model has no such layer."""
    if text is None:
        return None
    layers: list[int] = []
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--layers {text}: give numbers, as in 0,3 or 0-3")
        layers += range(int(first), int(last if dash else first) + 1)
    for layer in layers:
        if layer >= count:
            raise UserError(f"--layers {text}: the model has layers 0 to {count - 1}")
    return tuple(dict.fromkeys(layers))


def _chosen(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))
    for name in names:
        if name not in known:
            raise UserError(f"{option}: there is no {name!r}; choose from {', '.join(known)}")
    if not names:
        raise UserError(f"{option}: give one or more of {', '.join(known)}")
    return names


def read_text(artifact: Artifact, request: Request, notes: list[str]) -> Text:
    """Raises: UserError where it cannot be read, or was asked for and there is no tokenizer."""
    job = Job.of(artifact)
    folder = request.tokenizer_dir or _tokenizer_dir(artifact)
    ids = encode_text(artifact, request.text, folder, notes)
    if folder is None:
        return Text((), lambda token: f"<{token}>", f"random tokens of seed {request.seed}")
    tokenizer = load_tokenizer(folder, job.model.vocab_size)
    return Text(tuple(ids), lambda token: tokenizer.decode([token]), (request.text or default_text(job)).name)


def _tokenizer_dir(artifact: Artifact) -> Path | None:
    own = artifact.directory / "tokenizer"
    if own.is_dir():
        return own
    source = Job.of(artifact).source
    if source["kind"] == "hf" and any(Path(source["model_dir"]).glob("tokenizer*")):
        return Path(source["model_dir"])
    return None


def scenario_of(text: Text, limits: EngineLimits, tokens: int, seed: int) -> Scenario:
    """A ragged batch of windows of the text, of which the first halves are prompts; random tokens where there is too little
    text."""
    batch = max(1, min(4, limits.max_batch_size, tokens // 8))
    window = min(limits.max_seq_len, max(4, tokens // batch))
    ids = np.array(text.ids[: batch * window], np.int64)
    if len(ids) < batch * window:
        ids = np.random.default_rng(seed).integers(0, limits.vocab_size, batch * window)
    prompt = max(1, min(limits.max_input_len, window // 2))
    lengths = tuple(max(1, prompt - row) for row in range(batch))
    return Scenario("text", ids.reshape(batch, window), lengths, window - prompt)


def prompts_of(text: Text, limits: EngineLimits, count: int, output_len: int) -> list[list[int]]:
    """Beginnings of parts of the text, of unequal lengths, behind what the scenario takes of it; none where there is too
    little."""
    longest = min(limits.max_input_len, limits.max_seq_len - output_len)
    found = []
    for index in range(count):
        length = min(longest, 6 + 5 * index)
        start = (len(text.ids) // (count + 1)) * (index + 1)
        piece = list(text.ids[start : start + length])
        if len(piece) == length and length > 0:
            found.append(piece)
    return found
