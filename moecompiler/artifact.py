"""Output directories, for reading.

Each of "export", "optimize" and "engine" writes an *artifact*: a directory with the files of each rank, files shared by all
ranks, and a manifest that says what they are (``manifest``). ``artifact_writer`` writes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompiler.atomic import FileRecord, Progress, check_files
from moecompiler.errors import UserError
from moecompiler.manifest import MANIFEST, Manifest, RankRecord

STAGES = ("export", "optimize", "engine")
_MADE_BY = {"export": "export", "optimize": "optimize", "engine": "compile"}
_CONTINUED_BY = {"optimize": "optimize", "engine": "build"}


@dataclass(frozen=True)
class Artifact:
    """An output directory, for reading. ``open`` makes one; nothing of the files is read before ``check``."""

    directory: Path
    manifest: Manifest

    @staticmethod
    def open(directory: str | Path, stages: tuple[str, ...] | None = None) -> Artifact:
        """Reads the manifest; an unfinished artifact opens too (``check`` refuses it).

        Raises: UserError where there is none that can be used, or it is of none of ``stages``.
        """
        directory = Path(directory)
        made_by = _MADE_BY[stages[-1]] if stages else "compile"
        advice = f"make it with `moecompiler {made_by} … --output_dir {directory}`"
        if not os.path.isdir(directory):
            found = "is not a directory" if os.path.exists(directory) else "not found"
            raise UserError(f"{directory}: {found}; {advice}")
        try:
            manifest = Manifest.load(directory)
        except FileNotFoundError:
            raise UserError(f"{directory}: has no {MANIFEST}, so moecompiler did not write it; {advice}") from None
        if stages and manifest.stage not in stages:
            raise UserError(_wrong_stage(directory, manifest.stage, stages[-1]))
        return Artifact(directory, manifest)

    @property
    def stage(self) -> str:
        return self.manifest.stage

    @property
    def header(self) -> dict[str, Any]:
        return self.manifest.header

    @property
    def world_size(self) -> int:
        return self.manifest.world_size

    @property
    def ranks(self) -> list[int]:
        """The ranks that are there, made with the header's options."""
        current = self.manifest.header_fingerprint
        return sorted(rank for rank, record in self.manifest.ranks.items() if record.header == current)

    @property
    def shared_files(self) -> Mapping[str, FileRecord]:
        return self.manifest.files

    def rank_info(self, rank: int) -> dict[str, Any]:
        """Raises: UserError where the rank is missing."""
        return self._record(rank).info

    def rank_files(self, rank: int) -> Mapping[str, FileRecord]:
        """Raises: UserError where the rank is missing."""
        return self._record(rank).files

    def path(self, name: str) -> Path:
        """Where the file of that name is. Raises: UserError where the manifest names none."""
        if name not in self.manifest.named_files():
            raise UserError(f"{self.directory}: its {MANIFEST} names no file {name}")
        return self.directory / name

    def check(self, ranks: Iterable[int] | None = None, hashes: bool = True, progress: Progress | None = None) -> None:
        """Checks the files of ``ranks`` (all) and the shared ones: all there, of the recorded size and, with ``hashes``,
        SHA-256.

        Raises: UserError that names the rank or the file, also where the last run here has not finished.
        """
        files: dict[str, FileRecord] = {}
        for rank in range(self.world_size) if ranks is None else ranks:
            files |= self._record(rank).files
        if self.manifest.unfinished:
            raise UserError(f"{self.directory}: incomplete: the compile still runs or was interrupted; run it again")
        check_files(self.directory, files | self.manifest.files, hashes, progress)

    def _record(self, rank: int) -> RankRecord:
        if not 0 <= rank < self.world_size:
            raise UserError(f"{self.directory}: has no rank {rank}: it was made for {self.world_size} rank(s)")
        if (record := self.manifest.ranks.get(rank)) is None:
            why = "the compile was interrupted or limited by --rank; run it again"
            raise UserError(f"{self.directory}: rank {rank} is missing: {why}")
        if record.header != self.manifest.header_fingerprint:
            why = "the compile was interrupted or limited by --rank after its options changed; run it again"
            raise UserError(f"{self.directory}: rank {rank} is out of date: {why}")
        return record


def _wrong_stage(directory: Path, found: str, wanted: str) -> str:
    if wanted in _CONTINUED_BY and found in STAGES and STAGES.index(found) < STAGES.index(wanted):
        command = f"moecompiler {_CONTINUED_BY[wanted]} --checkpoint_dir {directory} --output_dir …"
        return f"{directory}: holds stage {found!r} where {wanted!r} is needed: run `{command}` and give its output"
    return f"{directory}: holds stage {found!r} where {wanted!r} is needed: give what `moecompiler {_MADE_BY[wanted]}` wrote"
