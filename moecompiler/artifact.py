"""Output directories: files and a manifest that says what they are, written so that any interruption can be resumed.

Each of "export", "optimize" and "engine" writes an *artifact*: a directory with the files of each rank, files shared by all
ranks, and ``manifest.json``. What keeps a directory honest, wherever a run is killed:

- The manifest says ``unfinished`` from the first file that is put in place to the end of the run.
- A rank's record is taken out before its files are touched and put back after; in between, the files are listed as
  ``stale``, so that the next run can remove what nobody names any more.
- A record says which header (options, mapping, …) it was last found to belong to. After an option change, the ranks that
  the new run has not looked at yet do not pass for ranks of the new options.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import moecompiler
from moecompiler.atomic import (
    FileRecord,
    Progress,
    Staged,
    check_files,
    exclusive_lock,
    fingerprint,
    is_temporary,
    remove_leftovers,
    replace,
    temporary_path,
    write_json_atomic,
)
from moecompiler.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
LOCK = ".lock"
STAGES = ("export", "optimize", "engine")
_MADE_BY = {"export": "export", "optimize": "optimize", "engine": "compile"}
_CONTINUED_BY = {"optimize": "optimize", "engine": "build"}


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


class ArtifactWriter:
    """An output directory that is being written; ``writing`` makes one and holds the directory's lock meanwhile."""

    def __init__(self, directory: Path, stage: str, world_size: int, header: dict[str, Any]) -> None:
        """Raises: UserError where the directory holds what this program cannot go on with."""
        self.directory = directory
        self._manifest = Manifest(stage, world_size, _as_json(header))
        self._header = self._manifest.header_fingerprint
        self._shared: set[str] = set()  # committed since this writer was made
        self._on_disk: dict[str, Any] | None = None
        with suppress(FileNotFoundError):
            self._take_over(Manifest.load(directory))

    def _take_over(self, old: Manifest) -> None:
        if old.stage != self._manifest.stage:
            raise UserError(
                f"{self.directory}: holds stage {old.stage!r}, {self._manifest.stage!r} cannot go to the same directory;"
                " give another --output_dir"
            )
        self._on_disk = old.to_json()
        self._manifest.files, self._manifest.unfinished, self._manifest.stale = old.files, old.unfinished, old.stale
        for rank, record in old.ranks.items():
            if rank < self._manifest.world_size:
                self._manifest.ranks[rank] = record
            else:
                self._manifest.stale |= record.files.keys()

    def is_done(self, rank: int, key: str, progress: Progress | None = None) -> bool:
        """Whether this rank's files were made for this key and are whole (they are read)."""
        record = self._manifest.ranks.get(rank)
        if record is None or record.key != key or not _is_whole(self.directory, record.files, progress):
            return False
        self._manifest.ranks[rank] = dataclasses.replace(record, header=self._header)
        return True

    def temp(self, name: str) -> Path:
        """Where to write what is to become file ``name``; any process may write there."""
        path = self.directory / check_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return temporary_path(path)

    def commit_rank(self, rank: int, key: str, staged: Mapping[str, Path | Staged], info: dict[str, Any]) -> None:
        """Puts a rank's files in place and records them; files of its older record that are not named are removed.

        Raises: ValueError where the rank is not of this world, or a name is another rank's or a shared file's.
        """
        if not 0 <= rank < self._manifest.world_size:
            raise ValueError(f"rank {rank} of {self._manifest.world_size}")
        measured = _measure(staged)
        others = [record.files for other, record in self._manifest.ranks.items() if other != rank]
        self._claim(measured, [*others, self._manifest.files])
        old = self._manifest.ranks.pop(rank, None)
        self._put(measured, old.files if old else ())
        files = {name: each.record for name, each in measured.items()}
        self._manifest.ranks[rank] = RankRecord(key, self._header, files, _as_json(info))
        self._save()
        self._sweep()

    def commit_file(self, name: str, temp: Path | Staged) -> None:
        """Puts a file shared by all ranks in place and records it. Shared files of an earlier run that are not committed
        again are removed at the end.

        Raises: ValueError where the name is a rank's.
        """
        measured = _measure({name: temp})
        record = measured[name].record
        self._claim(measured, [each.files for each in self._manifest.ranks.values()])
        self._shared.add(name)
        if self._manifest.files.get(name) == record and _is_whole(self.directory, {name: record}):
            measured[name].path.unlink()
            return
        self._manifest.files.pop(name, None)
        self._put(measured)
        self._manifest.files[name] = record
        self._save()
        self._sweep()

    def finish(self) -> None:
        """Removes what is not named any more and records that this run came to its end."""
        for name in self._manifest.files.keys() - self._shared:
            del self._manifest.files[name]
            self._manifest.stale.add(name)
        if self._manifest.stale:
            self._save()
            self._sweep()
        self._manifest.unfinished = False
        self._save()

    def _claim(self, names: Iterable[str], others: Iterable[Iterable[str]]) -> None:
        if taken := set(names) & set().union(*others):
            raise ValueError(f"{self.directory}: {', '.join(sorted(taken))} already belongs to another rank or to all")

    def _put(self, staged: Mapping[str, Staged], superseded: Iterable[str] = ()) -> None:
        # First the manifest says that these files cannot be relied on: we may be killed between any two lines.
        self._manifest.unfinished = True
        self._manifest.stale |= {*staged, *superseded}
        self._save()
        for name, each in staged.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(each.path, path)

    def _sweep(self) -> None:
        """Removes the stale files that no record names. The manifest on disk lists them until the next ``_save``."""
        for name in self._manifest.stale - self._manifest.named_files():
            path = self.directory / name
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                if path.parent != self.directory:
                    path.parent.rmdir()
        self._manifest.stale = set()

    def _save(self) -> None:
        data = self._manifest.to_json()
        if data != self._on_disk:
            write_json_atomic(self.directory / MANIFEST, data)
            self._on_disk = data


@contextmanager
def writing(directory: str | Path, stage: str, world_size: int, header: dict[str, Any]) -> Iterator[ArtifactWriter]:
    """Makes or continues an artifact in ``directory``; ranks recorded by an earlier run are kept for ``is_done``.

    When the block raises, what was committed stays, to be resumed, and temporary files go; a directory that was made
    here and got nothing goes too.
    Raises: UserError where the directory cannot be made, holds files that are not ours, another stage, or an artifact of
    another version, or another process is writing there.
    """
    directory = Path(directory)
    with ExitStack() as stack:
        try:
            if not directory.exists():
                directory.mkdir(parents=True)
                stack.callback(_remove_if_empty, directory)
            _refuse_foreign(directory)
            stack.enter_context(exclusive_lock(directory / LOCK))
        except BlockingIOError:
            raise UserError(
                f"{directory}: another moecompiler is writing there; wait for its end or give another --output_dir"
            ) from None
        except OSError as error:
            raise UserError(f"{directory}: cannot be written: {error.strerror}; give another --output_dir") from None
        writer = ArtifactWriter(directory, stage, world_size, header)
        remove_leftovers(directory)
        stack.callback(remove_leftovers, directory)
        yield writer
        writer.finish()


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


def _wrong_stage(directory: Path, found: str, wanted: str) -> str:
    if wanted in _CONTINUED_BY and found in STAGES and STAGES.index(found) < STAGES.index(wanted):
        command = f"moecompiler {_CONTINUED_BY[wanted]} --checkpoint_dir {directory} --output_dir …"
        return f"{directory}: holds stage {found!r} where {wanted!r} is needed: run `{command}` and give its output"
    return f"{directory}: holds stage {found!r} where {wanted!r} is needed: give what `moecompiler {_MADE_BY[wanted]}` wrote"


def _refuse_foreign(directory: Path) -> None:
    """Raises UserError where files lie there that no manifest of ours accounts for."""
    if (directory / MANIFEST).is_file():
        return
    nested = {path.parent for path in directory.rglob(MANIFEST)}  # artifacts that a compile puts inside its own
    for path in directory.rglob("*"):
        ours = path.name == LOCK or is_temporary(path) or (path.is_dir() and not path.is_symlink())
        ours = ours or not nested.isdisjoint(path.parents)
        if not ours:
            raise UserError(
                f"{directory}: holds files of someone else ({path.name}); give an empty or new --output_dir"
            )


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def _measure(staged: Mapping[str, Path | Staged]) -> dict[str, Staged]:
    return {check_name(name): each if isinstance(each, Staged) else Staged.of(each) for name, each in staged.items()}


def _is_whole(directory: Path, files: Mapping[str, FileRecord], progress: Progress | None = None) -> bool:
    try:
        check_files(directory, files, progress=progress)
    except UserError:
        return False
    return True


def _as_json(data: dict[str, Any]) -> dict[str, Any]:
    """The same as reading it back would give: lists for tuples, string keys."""
    return json.loads(json.dumps(data, allow_nan=False))


def _files_to_json(files: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {name: asdict(record) for name, record in files.items()}


def _files_from_json(data: Any) -> dict[str, FileRecord]:
    return {check_name(name): FileRecord.from_json(record) for name, record in _typed(data, dict).items()}


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
