"""Output directories, written so that any interruption, kill -9 included, can be resumed."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from moecompiler.atomic import (
    FileRecord,
    Progress,
    Staged,
    check_files,
    exclusive_lock,
    is_temporary,
    remove_leftovers,
    replace,
    temporary_path,
    write_json_atomic,
)
from moecompiler.errors import UserError
from moecompiler.manifest import LOCK, MANIFEST, Manifest, RankRecord, check_name

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in the user's share of it, or in a file


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

    def whole_files(self, prefix: str) -> list[str]:
        """The files of any rank's record whose names begin so, where all of these are whole (they are read); else none."""
        found = {name: each for files in self._records() for name, each in files.items() if name.startswith(prefix)}
        return sorted(found) if _is_whole(self.directory, found) else []

    def commit_rank(
        self,
        rank: int,
        key: str,
        staged: Mapping[str, Path | Staged],
        info: dict[str, Any],
        shared: Mapping[str, Path | Staged | None] | None = None,
    ) -> None:
        """Puts a rank's files in place and records them; files of its older record that nobody names any more are removed.
        ``shared``: files that other ranks may have too; None where one has it already.

        Raises: ValueError where the rank is not of this world, a name is another rank's or a shared file's, or no rank has a file
        that is said to be there.
        """
        if not 0 <= rank < self._manifest.world_size:
            raise ValueError(f"rank {rank} of {self._manifest.world_size}")
        common = shared or {}
        there = [name for name, each in common.items() if each is None]
        added = _measure({name: each for name, each in common.items() if each is not None})
        measured = _measure(staged)
        others = [record.files for other, record in self._manifest.ranks.items() if other != rank]
        self._claim(measured, [*others, self._manifest.files])
        self._claim(added, [self._manifest.files])
        known = {name: record for files in self._records() for name, record in files.items()}
        if missing := set(there) - known.keys():
            raise ValueError(f"{self.directory}: no rank has {min(missing)}")
        measured |= added
        old = self._manifest.ranks.pop(rank, None)
        self._put(measured, old.files if old else ())
        files = {name: each.record for name, each in measured.items()} | {name: known[name] for name in there}
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

    def _records(self) -> list[Mapping[str, FileRecord]]:
        return [record.files for record in self._manifest.ranks.values()]

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
    another version, another process is writing there, or the disk is full.
    """
    directory = Path(directory)
    with ExitStack() as stack:
        try:
            missing = [path for path in (directory, *directory.parents) if not path.exists()]
            if missing:
                directory.mkdir(parents=True)
            for path in reversed(missing):
                stack.callback(_remove_if_empty, path)
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
        try:
            yield writer
            writer.finish()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise UserError(
                f"{error.filename or directory}: cannot be written: {error.strerror}; make room and run the same command again,"
                " which goes on with what is missing"
            ) from None


def _refuse_foreign(directory: Path) -> None:
    """Raises UserError where files lie there that no manifest of ours accounts for."""
    if (directory / MANIFEST).is_file():
        return
    nested = {path.parent for path in directory.rglob(MANIFEST) if _is_ours(path.parent)}
    for path in directory.rglob("*"):
        ours = path.name == LOCK or is_temporary(path) or (path.is_dir() and not path.is_symlink())
        ours = ours or not nested.isdisjoint(path.parents)
        if not ours:
            raise UserError(
                f"{directory}: holds files of someone else ({path.name}); give an empty or new --output_dir"
            )


def _is_ours(directory: Path) -> bool:
    """Whether it is an artifact, as a compile puts them inside its own directory."""
    try:
        Manifest.load(directory)
    except UserError:
        return False
    return True


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
