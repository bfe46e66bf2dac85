"""Files: there whole or not at all, whatever happens while they are written, and known by size and SHA-256 afterwards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompiler.errors import UserError

_TEMPORARY = re.compile(r"\.tmp-\d+-.+")
_BUFFER_BYTES = 4 << 20

Progress = Callable[[float, float], None]  # what is done, of how much


def temporary_path(path: Path) -> Path:
    """The name under which this process writes ``path`` before it is whole: in the same directory, ``.tmp-<pid>-<name>``."""
    return path.with_name(f".tmp-{os.getpid()}-{path.name}")


def is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Gives a name to write to; what is there is removed when the block raises, and left for ``replace`` otherwise."""
    temporary = temporary_path(path)
    try:
        yield temporary
    except BaseException:
        _remove(temporary)
        raise


def replace(temporary: Path, path: Path) -> None:
    """Gives a file its name in one step; when this returns, file and name have reached the disk.

    Raises: OSError, also where the two are on different file systems.
    """
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 with the line ends that ``text`` has."""
    with temporary_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
        replace(temporary, path)


def write_json_atomic(path: Path, data: Any) -> None:
    """Writes ``data`` as ``json_text`` has it."""
    write_text_atomic(path, json_text(data))


def json_text(data: Any) -> str:
    """Indented JSON; equal data give equal text.

    Raises: TypeError, ValueError where ``data`` is no JSON (NaN and infinities are none).
    """
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def sha256_file(path: Path, progress: Progress | None = None) -> str:
    """The file's SHA-256 in hexadecimal digits; ``progress`` hears (bytes done, bytes in all) every few megabytes."""
    with path.open("rb", buffering=0) as file:
        if progress is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        total = os.fstat(file.fileno()).st_size
        digest, buffer, done = hashlib.sha256(), memoryview(bytearray(_BUFFER_BYTES)), 0
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            progress(done, total)
        return digest.hexdigest()


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however it ends; the lock's file is removed afterwards.

    Raises: BlockingIOError, at once, where somebody else holds it; OSError where it cannot be taken.
    """
    descriptor = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                # The holder before us may have removed the file after we opened it: such a lock keeps nobody out.
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def remove_leftovers(directory: Path) -> None:
    """Removes every temporary file at or below ``directory``, whichever process made it.

    Only for who knows that nobody else is writing there (``artifact.writing`` holds a lock).
    """
    for path in list(directory.rglob(".tmp-*")):
        if is_temporary(path):
            _remove(path)


def fingerprint(*parts: Any) -> str:
    """SHA-256, in hexadecimal digits, of the parts as canonical JSON; tuples count as lists, dict order does not count.

    Raises: TypeError, ValueError where a part is no JSON.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path, progress: Progress | None = None) -> FileRecord:
        return FileRecord(path.stat().st_size, sha256_file(path, progress))

    @staticmethod
    def from_json(data: dict[str, Any]) -> FileRecord:
        size, digest = data["bytes"], data["sha256"]
        if type(size) is not int or type(digest) is not str:
            raise TypeError(f"{data!r} is no file's size and SHA-256")
        return FileRecord(size, digest)


@dataclass(frozen=True)
class Staged:
    """A finished temporary file, measured and on the disk, to be committed. Made where it was written, ranks hash in
    parallel."""

    path: Path
    record: FileRecord

    @staticmethod
    def of(path: Path, progress: Progress | None = None) -> Staged:
        sync(path)
        return Staged(path, FileRecord.of(path, progress))


def check_files(
    directory: Path, files: Mapping[str, FileRecord], hashes: bool = True, progress: Progress | None = None
) -> None:
    """Raises UserError that names the first file that is missing, of another size, or (``hashes``) of other content."""
    for name, record in files.items():
        path = directory / name
        if not os.path.isfile(path):
            raise UserError(f"{path}: missing; run the compile again")
        if (size := os.path.getsize(path)) != record.bytes:
            raise UserError(f"{path}: has {size} bytes instead of {record.bytes}: damaged; run the compile again")
    done, total = 0, sum(record.bytes for record in files.values())
    for name, record in files.items() if hashes else ():
        report = None if progress is None else _shifted(progress, done, total)
        try:
            actual = sha256_file(directory / name, report)
        except OSError as error:
            raise UserError(f"{directory / name}: cannot be read: {error.strerror}") from None
        if actual != record.sha256:
            raise UserError(f"{directory / name}: its SHA-256 is not the recorded one: damaged; run the compile again")
        done += record.bytes


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
