import fcntl
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecompiler.atomic import (
    FileRecord,
    Staged,
    check_files,
    exclusive_lock,
    fingerprint,
    is_temporary,
    json_text,
    remove_leftovers,
    replace,
    sha256_file,
    sync,
    temporary_beside,
    write_json_atomic,
    write_text_atomic,
)
from moecompiler.errors import UserError


def test_temporary_lies_beside_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with temporary_beside(path) as temporary:
        assert temporary == tmp_path / f".tmp-{os.getpid()}-a.bin"
        assert is_temporary(temporary)
        temporary.write_bytes(b"whole")
        replace(temporary, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_bytes() == b"whole"


def test_replace_syncs_content_then_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr("moecompiler.atomic.sync", lambda path: synced.append((path, (tmp_path / "a").exists())))
    (tmp_path / "b").touch()
    replace(tmp_path / "b", tmp_path / "a")
    assert synced == [(tmp_path / "b", False), (tmp_path, True)]
    monkeypatch.undo()
    for path in (tmp_path, tmp_path / "a"):
        sync(path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("made", ["nothing", "file", "directory"])
def test_temporary_goes_on_error_and_the_old_file_stays(tmp_path: Path, error: type, made: str) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old")

    def fail() -> None:
        with temporary_beside(path) as temporary:
            if made == "file":
                temporary.write_text("half")
            elif made == "directory":
                (temporary / "below").mkdir(parents=True)
            raise error

    with pytest.raises(error):
        fail()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.bin": "old"}


def test_failed_write_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "x" * 100_000 + "\ud800")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.txt": b"old\n"}


def test_json_is_deterministic(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a", {"b": [1, 2], "a": {"d": None, "c": "é"}})
    write_json_atomic(tmp_path / "b", {"a": {"c": "é", "d": None}, "b": (1, 2)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text(float("nan"))


@pytest.mark.parametrize("size", [0, 1, 4 << 20, (4 << 20) + 1, 9_000_000])
def test_sha256_with_and_without_progress(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a"
    content = os.urandom(size)
    path.write_bytes(content)
    heard: list[tuple[float, float]] = []
    expected = hashlib.sha256(content).hexdigest()
    assert sha256_file(path) == sha256_file(path, lambda *report: heard.append(report)) == expected
    assert heard == sorted(heard)
    assert (heard[-1] == (size, size)) if size else not heard


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    kept = [".tmp-x-name", ".tmp-12", "tmp-1-a", ".lock", "below/.hidden"]
    for name in [*kept, ".tmp-1-a", "below/.tmp-99999-b.onnx", ".tmp-3-directory/file"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == set(kept)


def test_lock_keeps_others_out_and_leaves_no_file(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with exclusive_lock(lock), pytest.raises(BlockingIOError), exclusive_lock(lock):
        pass
    with exclusive_lock(lock):
        assert lock.exists()
    assert not lock.exists()
    lock.touch()  # of a run that was killed
    with exclusive_lock(lock):
        pass


def test_lock_on_a_file_that_was_just_removed_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    flock, calls = fcntl.flock, []

    def after_its_holder_ended(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            lock.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_its_holder_ended)
    with exclusive_lock(lock):
        assert len(calls) == 2
        assert lock.exists()


def test_check_files_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"aaaa")
    (tmp_path / "b").write_bytes(b"bb")
    files = {name: Staged.of(tmp_path / name).record for name in "ab"}
    heard: list[tuple[float, float]] = []
    check_files(tmp_path, files, progress=lambda *report: heard.append(report))
    assert heard == [(4, 6), (6, 6)]
    (tmp_path / "b").write_bytes(b"bx")
    check_files(tmp_path, files, hashes=False)
    with pytest.raises(UserError, match=r"/b: its SHA-256 is not the recorded one"):
        check_files(tmp_path, files)
    (tmp_path / "b").write_bytes(b"b")
    with pytest.raises(UserError, match=r"/b: has 1 bytes instead of 2"):
        check_files(tmp_path, files, hashes=False)
    with pytest.raises(UserError, match=r"/c: missing"):
        check_files(tmp_path, {"c": FileRecord(0, "")})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _reordered(data: object) -> object:
    if isinstance(data, dict):
        return {key: _reordered(data[key]) for key in reversed(data)}
    return tuple(_reordered(each) for each in data) if isinstance(data, list) else data


@given(st.lists(JSON, max_size=3))
def test_fingerprint_knows_neither_order_nor_tuples(parts: list) -> None:
    assert fingerprint(*parts) == fingerprint(*(_reordered(part) for part in parts))


@given(JSON, JSON)
def test_fingerprint_tells_different_data_apart(a: object, b: object) -> None:
    assert (fingerprint(a) == fingerprint(b)) == (json_text(a) == json_text(b))
    assert fingerprint(a, b) != fingerprint([a, b])


def test_fingerprint_is_the_same_in_every_version() -> None:
    # Keys on users' disks depend on it: a change makes every compile start anew. The number is from
    # printf '[{"a":[null,"\\u00e9",0.5],"b":1},2]' | sha256sum
    expected = "04425743fe62d7986ebce389c755c4cc851687314e51edcaf79b0bcab8643fb3"
    assert fingerprint({"b": 1, "a": [None, "é", 0.5]}, 2) == expected
    with pytest.raises(TypeError):
        fingerprint(Path("a"))
