"""What every backend offers: build a rank's engine from its program, load it as a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moecompiler.graph import Program
from moecompiler.weights import TensorReader

if TYPE_CHECKING:
    from moecompiler.runtime.session import StageSession


@dataclass(frozen=True)
class EngineLimits:
    """The largest request an engine takes, in sequences and tokens, and the size of its vocabulary."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    vocab_size: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Backend(Protocol):
    """One way to run a program; ``name`` is what ``--backend`` calls it."""

    name: str

    def version(self) -> str:
        """Which library, in which version, makes the engines."""

    def notes(self, dtype: str) -> list[str]:
        """What a user should know of how this backend computes ``dtype``, one line each."""

    def compute_dtype(self, dtype: str) -> str:
        """The dtype an engine of ``dtype`` computes in."""

    def build(
        self, program: Program, reader: TensorReader, stem: str, directory: Path, progress: Callable[[float], None]
    ) -> dict[str, Path]:
        """Makes a rank's engine files in ``directory`` under temporary names (``.tmp-…``): final name → temporary path."""

    def load(self, directory: Path, stem: str, limits: EngineLimits, threads: int) -> StageSession:
        """Loads a rank's engine; ``threads`` of the CPU for it (0: as many as there are)."""
