"""``manifest.json`` of an output directory: what it holds, of which options, in which format.

- It says ``unfinished`` from the first file that is put in place to the end of the run.
- A rank's record is taken out before its files are touched and put back after; in between, the files are listed as
  ``stale``, so that the next run can remove what nobody names any more.
- A record says which header (options, mapping, …) it was last found to belong to. After an option change, the ranks that
  the new run has not looked at yet do not pass for ranks of the new options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import moecompiler
from moecompiler.atomic import FileRecord, fingerprint, is_temporary
from moecompiler.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
LOCK = ".lock"


@dataclass(frozen=True)
class RankRecord:
    """One rank's files. ``key``: fingerprint of all they depend on; ``header``: of the header they were last found right for."""

    key: str
    header: str
    files: Mapping[str, FileRecord]
    info: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "header": self.header, "files": _files_to_json(self.files), "info": self.info}

    @staticmethod
    def from_json(data: dict[str, Any]) -> RankRecord:
        files, info = _files_from_json(data["files"]), _typed(data["info"], dict)
        return RankRecord(_typed(data["key"], str), _typed(data["header"], str), files, info)


@dataclass
class Manifest:
    """The content of ``manifest.json``."""

    stage: str
    world_size: int
    header: dict[str, Any]
    ranks: dict[int, RankRecord] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    unfinished: bool = False
    stale: set[str] = field(default_factory=set)
    version: str = moecompiler.__version__

    @property
    def header_fingerprint(self) -> str:
        return fingerprint(self.header, self.world_size)

    def named_files(self) -> set[str]:
        return set(self.files).union(*(record.files for record in self.ranks.values()))

    def to_json(self) -> dict[str, Any]:
        data = {
            "format": FORMAT,
            "moecompiler": self.version,
            "stage": self.stage,
            "world_size": self.world_size,
            "header": self.header,
            "ranks": {str(rank): record.to_json() for rank, record in self.ranks.items()},
            "files": _files_to_json(self.files),
        }
        if self.unfinished:
            data["unfinished"] = True
        if self.stale:
            data["stale"] = sorted(self.stale)
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Manifest:
        """Raises: KeyError, TypeError, ValueError where the data is not what ``to_json`` gives."""
        if _typed(data["world_size"], int) < 1:
            raise ValueError(f"world_size is {data['world_size']}")
        return Manifest(
            stage=_typed(data["stage"], str),
            world_size=data["world_size"],
            header=_typed(data["header"], dict),
            ranks={int(rank): RankRecord.from_json(record) for rank, record in _typed(data["ranks"], dict).items()},
            files=_files_from_json(data["files"]),
            unfinished=_typed(data.get("unfinished", False), bool),
            stale={check_name(_typed(name, str)) for name in _typed(data.get("stale", []), list)},
            version=_typed(data["moecompiler"], str),
        )

    @staticmethod
    def load(directory: Path) -> Manifest:
        """Raises: FileNotFoundError where there is none; UserError where it cannot be used."""
        path = directory / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read: {error}; compile again into another directory") from None
        if not isinstance(data, dict) or "moecompiler" not in data:
            raise UserError(f"{path}: is no manifest of moecompiler; give a directory that moecompiler wrote")
        if data.get("format") != FORMAT:
            raise UserError(
                f"{directory}: made by another version of moecompiler (format {data.get('format')!r}, this one reads"
                f" {FORMAT}): compile again into another directory"
            )
        try:
            return Manifest.from_json(data)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is damaged ({error}); compile again into another directory") from None


def check_name(name: str) -> str:
    """Returns ``name``, a relative path with ``/``. Raises: ValueError where it could lead out of the directory or is one
    of the names kept for bookkeeping."""
    parts = PurePosixPath(name).parts
    plain = "/".join(parts) == name and "\\" not in name and "\0" not in name
    if not parts or not plain or name.startswith("/") or ".." in parts:
        raise ValueError(f"file name {name!r} is not a plain path inside the directory")
    if name in (MANIFEST, LOCK) or is_temporary(Path(name)):
        raise ValueError(f"file name {name!r} is kept for bookkeeping")
    return name


def _files_to_json(files: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {name: asdict(record) for name, record in files.items()}


def _files_from_json(data: Any) -> dict[str, FileRecord]:
    return {check_name(name): FileRecord.from_json(record) for name, record in _typed(data, dict).items()}


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
