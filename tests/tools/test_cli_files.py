"""Files that are not as they were, or cannot be written: one line that names them, and nothing half made."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import save_hf
from cli import Here, contents

from moecompiler.atomic import is_temporary

SMALL = ("--num_layers", 1, "--max_seq_len", 32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(tmp_path_factory.mktemp("files") / "hf", max_shard_size="100KB")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moecompiler.tools.main import main

    directory = tmp_path_factory.mktemp("files") / "export"
    words = ("export", "--model_dir", checkpoint, *SMALL, "--output_dir", directory)
    assert main([str(word) for word in words]) == 0
    return directory


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """For this process and those that it starts; a full disk in all but the error's number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("what", "packs"), [("rank0.onnx", ()), ("rank0.safetensors", ("--pack_weights",))])
def test_no_room(what: str, packs: tuple[str, ...], checkpoint: Path, here: Here, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    words = ("export", "--model_dir", checkpoint, *SMALL, *packs)
    assert here(*words, "--output_dir", whole).status == 0
    with no_file_larger_than((whole / what).stat().st_size - 1):
        output = here(*words, "--output_dir", again)
    assert output.status == 2
    assert len(output.complaints) == 1
    assert "cannot be written: File too large" in output.err
    assert not [path for path in again.rglob("*") if is_temporary(path) or path.suffix == ".onnx"]
    assert here(*words, "--output_dir", again).status == 0
    assert contents(again) == contents(whole)


@pytest.mark.parametrize("error", ["No space left on device", "Disk quota exceeded"])
def test_no_room_to_record_what_is_done(error: str, tmp_path: Path) -> None:
    import errno

    from moecompiler.artifact_writer import writing
    from moecompiler.errors import UserError

    number = {"No space left on device": errno.ENOSPC, "Disk quota exceeded": errno.EDQUOT}[error]

    def fail(with_error: OSError) -> None:
        with writing(tmp_path / "full", "export", 1, {}) as writer:
            writer.temp("rank0.onnx").write_bytes(b"half")
            raise with_error

    with pytest.raises(UserError, match=f"{error}; make room and run the same command again"):
        fail(OSError(number, os.strerror(number)))
    assert not list(tmp_path.rglob(".tmp-*"))
    with pytest.raises(PermissionError):
        fail(PermissionError(errno.EPERM, "something else"))


def shard(checkpoint: Path, *, first_layer: bool) -> Path:
    from moecompiler.checkpoint_files import find_files

    _, index = find_files(checkpoint)
    return checkpoint / index["model.layers.0.self_attn.q_proj.weight" if first_layer else "lm_head.weight"]


@pytest.mark.parametrize("first_layer", [True, False])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("remove", "cannot be read: No such file or directory"),
        ("touch", "files changed since they were first read (1): "),
        ("grow", "files changed since they were first read (1): "),
    ],
)
def test_a_shard_that_changed_since_export(
    change: str, said: str, first_layer: bool, checkpoint: Path, exported: Path, here: Here, tmp_path: Path
) -> None:
    """Graphs by reference are worthless over other files; building finds out before it reads a weight."""
    file = shard(checkpoint, first_layer=first_layer)
    kept = shutil.copy2(file, tmp_path / file.name)
    if change == "remove":
        file.unlink()
    elif change == "touch":
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    else:
        with file.open("ab") as stream:
            stream.write(b"x")
        os.utime(file, ns=(0, Path(kept).stat().st_mtime_ns))
    try:
        output = here("build", "--checkpoint_dir", exported, "--output_dir", tmp_path / "engine")
    finally:
        file.unlink(missing_ok=True)
        shutil.copy2(kept, file)
    assert output.status == 2
    assert len(output.complaints) == 1
    assert said in output.err
    assert file.name in output.err
    assert not list((tmp_path / "engine").glob("rank*"))


def test_a_shard_missing_from_the_start(checkpoint: Path, here: Here, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "hf")
    shard(model, first_layer=True).unlink()
    output = here("export", "--model_dir", model, *SMALL, "--output_dir", tmp_path / "export")
    assert output.status == 2
    assert "files missing that the index names (1): model-" in output.err
    assert not (tmp_path / "export").exists()
