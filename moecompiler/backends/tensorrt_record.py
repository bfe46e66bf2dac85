"""What is known of a built engine beside its plan: the file ``STEM.engine.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moecompiler.errors import UserError


@dataclass(frozen=True)
class Made:
    """Where an engine was made, which is where it may run. ``sm``: compute capability, 90 for 9.0; ``driver``: CUDA version."""

    tensorrt: str
    sm: int
    gpu: str
    driver: str


@dataclass(frozen=True)
class Record:
    """``prefill_rows``: sequences of a prefill step. ``bound``: weights that are inputs of the engine. ``plugins``: node → op.
    ``shared``: the stem of the plan's files, where ranks share them.
    ``aliases``: output → the input in whose place it is written. ``layers``: HF modules' nodes are named in ``STEM.layers.json``.
    """

    made: Made
    prefill_rows: int
    bound: tuple[str, ...]
    plugins: dict[str, str]
    aliases: dict[str, str]
    shared: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def load(path: Path) -> Record:
        """Raises: UserError where the file is missing or no record."""
        try:
            data = json.loads(path.read_text())
            return Record(
                Made(**data["made"]),
                data["prefill_rows"],
                tuple(data["bound"]),
                data["plugins"],
                data["aliases"],
                data.get("shared"),
            )
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; build the engine anew") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is not the record of an engine: {error}; build the engine anew") from None


def check_fits(made: Made, here: Made, directory: Path) -> None:
    """Raises: UserError where an engine made there does not run here."""
    if made.tensorrt != here.tensorrt:
        raise UserError(
            f"{directory}: was built by TensorRT {made.tensorrt}, here is {here.tensorrt}: install tensorrt=={made.tensorrt},"
            " or build anew with `moecompiler build`"
        )
    if made.sm != here.sm:
        raise UserError(
            f"{directory}: was built on {made.gpu} (SM {made.sm}), here is {here.gpu} (SM {here.sm}):"
            " run it on such a GPU, or build anew here with `moecompiler build`"
        )
