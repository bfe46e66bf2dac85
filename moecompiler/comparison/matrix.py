"""Many artifacts of one model in one table: type and quantization, plugins on and off, mapping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moecompiler.comparison.result import REFERENCE, ProgramInfo, Result, plain
from moecompiler.errors import UserError


@dataclass(frozen=True)
class MatrixRow:
    """A program of an artifact's comparison. ``artifact``: the comparison's name; ``plugins``: how many nodes run as plugins.
    ``reference_perplexity``: of PyTorch with the weights that this comparison's reference holds, quantized ones where the
    artifact's are; ``increase``: of the perplexity, relative to it; ``rerouted``: the share of (layer, token) with any of the
    ``flips``. What was not measured is None. ``passed``: the whole comparison."""

    artifact: str
    program: str
    dtype: str
    quantization: str
    mapping: str
    backend: str
    plugins: int
    perplexity: float | None
    reference_perplexity: float | None
    increase: float | None
    mean_kl: float | None
    top1: float | None
    flips: int | None
    rerouted: float | None
    decode_ms: float | None
    tokens_per_second: float | None
    plan_bytes: int | None
    weight_bytes: int | None
    passed: bool


@dataclass(frozen=True)
class Matrix:
    """``notes``: in what the comparisons differ that makes their rows hard to compare."""

    model: str
    rows: tuple[MatrixRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """As ``Result.to_json``."""
        return {**plain(asdict(self)), "passed": self.passed}


def matrix_of(results: Mapping[str, Result]) -> Matrix:
    """``results``: comparisons by name, of one model; a row for each program but the reference, in their order.

    Raises: UserError where there are none, or of several models.
    """
    models = list(dict.fromkeys(result.meta.model for result in results.values()))
    if len(models) != 1:
        found = f"{', '.join(models[:-1])} and {models[-1]}" if models else "none"
        raise UserError(f"--matrix: a table is of artifacts of one model, not of {found}")
    rows = tuple(
        _row(name, result, info)
        for name, result in results.items()
        for info in result.meta.programs
        if info.name != REFERENCE
    )
    return Matrix(models[0], rows, tuple(_differences(results.values())))


def artifact_names(directories: Sequence[Path]) -> list[str]:
    """What to call artifacts: their directories' names, told apart by a number where two are the same."""
    names: list[str] = []
    for directory in directories:
        base = directory.resolve().name or "artifact"
        candidates = (base if number == 1 else f"{base}-{number}" for number in range(1, len(directories) + 2))
        names.append(next(name for name in candidates if name not in names))
    return names


def _row(name: str, result: Result, info: ProgramInfo) -> MatrixRow:
    logits = next((each for each in result.model.programs if each.program == info.name), None) if result.model else None
    routing = (
        next((each for each in result.routing.programs if each.program == info.name), None) if result.routing else None
    )
    wanted = result.model.reference_perplexity if result.model else math.nan
    return MatrixRow(
        name,
        info.name,
        info.dtype,
        info.quantization,
        info.mapping,
        info.backend,
        sum(info.plugins.values()),
        logits.perplexity if logits else None,
        wanted if logits else None,
        logits.perplexity / wanted - 1 if logits and wanted else None,
        logits.mean_kl if logits else None,
        logits.top1 if logits else None,
        len(routing.flips) if routing else None,
        routing.rerouted if routing else None,
        info.decode_ms,
        info.tokens_per_second,
        info.plan_bytes,
        info.weight_bytes,
        result.passed,
    )


def _differences(results: Iterable[Result]) -> list[str]:
    metas = [result.meta for result in results]
    notes = []
    for what in ("text", "tokens", "prompt_tokens", "seed", "machine", "layers"):
        values = list(dict.fromkeys(str(getattr(meta, what)) for meta in metas))
        if len(values) > 1:
            notes.append(f"not all of one {what.replace('_', ' ')}: {', '.join(values)}")
    return notes
