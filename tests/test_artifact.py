"""The output directory: what it refuses, and that kill -9 at any moment leaves it incomplete-and-said-so or complete."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecompiler.artifact import Artifact
from moecompiler.artifact_writer import ArtifactWriter, writing
from moecompiler.atomic import Staged, fingerprint
from moecompiler.errors import UserError
from moecompiler.manifest import MANIFEST


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing is slow, and only a power cut would tell the difference."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def put(writer: ArtifactWriter, name: str, content: str) -> Path:
    temporary = writer.temp(name)
    temporary.write_text(content)
    return temporary


def build(
    directory: Path, option: str = "a", world_size: int = 4, only: int | None = None, delay: float = 0
) -> list[int]:
    """A compile in small; ``option`` touches the even ranks and the tokenizer. Returns the ranks that were made."""
    made = []
    with writing(directory, "engine", world_size, {"option": option, "sizes": (1, 2)}) as writer:
        for rank in range(world_size) if only is None else [only]:
            touched = option if rank % 2 == 0 else "-"
            key = fingerprint(rank, touched)
            if writer.is_done(rank, key):
                continue
            made.append(rank)
            staged = {}
            for name in (f"rank{rank}.onnx", f"weights/{touched}{rank}.bin"):
                time.sleep(delay)
                staged[name] = put(writer, name, f"{name} of {key}")
            writer.commit_rank(rank, key, staged, {"option": touched, "layers": (0, rank)})
        writer.commit_file("tokenizer/tokenizer.json", put(writer, "tokenizer/tokenizer.json", option))
        if option == "a":
            writer.commit_file("only/a.json", put(writer, "only/a.json", option))
    return made


def tree(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_whole_directory(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "engine"
    assert build(directory) == [0, 1, 2, 3]
    artifact = Artifact.open(directory, ("engine",))
    heard: list[tuple[float, float]] = []
    artifact.check(progress=lambda *report: heard.append(report))
    assert heard[-1][0] == heard[-1][1] > 0
    assert (artifact.stage, artifact.world_size, artifact.ranks) == ("engine", 4, [0, 1, 2, 3])
    assert artifact.header == {"option": "a", "sizes": [1, 2]}
    assert artifact.rank_info(3) == {"option": "-", "layers": [0, 3]}
    assert set(artifact.rank_files(2)) == {"rank2.onnx", "weights/a2.bin"}
    assert artifact.path("tokenizer/tokenizer.json").read_text() == "a"
    manifest = json.loads((directory / MANIFEST).read_text())
    assert (manifest["format"], manifest["stage"], manifest["world_size"]) == (1, "engine", 4)
    assert "unfinished" not in manifest
    assert "stale" not in manifest
    named = {
        "rank0.onnx",
        "rank1.onnx",
        "rank2.onnx",
        "rank3.onnx",
        "only/a.json",
        "tokenizer/tokenizer.json",
        MANIFEST,
    }
    assert set(tree(directory)) == named | {f"weights/{w}.bin" for w in ("a0", "-1", "a2", "-3")}


def test_again_touches_nothing(tmp_path: Path) -> None:
    build(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert build(tmp_path) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == stamps


def test_option_change_redoes_what_it_touches(tmp_path: Path) -> None:
    build(tmp_path / "changed", "a")
    assert build(tmp_path / "changed", "b") == [0, 2]
    build(tmp_path / "fresh", "b")
    assert tree(tmp_path / "changed") == tree(tmp_path / "fresh")
    assert not (tmp_path / "changed" / "only").exists()


@pytest.mark.parametrize(("before", "after", "made"), [(4, 2, []), (2, 4, [2, 3])])
def test_world_size_change(tmp_path: Path, before: int, after: int, made: list[int]) -> None:
    build(tmp_path / "changed", world_size=before)
    assert build(tmp_path / "changed", world_size=after) == made
    build(tmp_path / "fresh", world_size=after)
    assert tree(tmp_path / "changed") == tree(tmp_path / "fresh")


def test_single_ranks_make_the_whole(tmp_path: Path) -> None:
    for rank in (2, 0, 3):
        build(tmp_path / "parts", only=rank)
    artifact = Artifact.open(tmp_path / "parts")
    artifact.check(ranks=[0, 3])
    with pytest.raises(UserError, match=r"rank 1 is missing: .* limited by --rank; run it again"):
        artifact.check()
    build(tmp_path / "parts", only=1)
    build(tmp_path / "fresh")
    assert tree(tmp_path / "parts") == tree(tmp_path / "fresh")


def test_ranks_of_other_options_do_not_pass(tmp_path: Path) -> None:
    build(tmp_path, "a")
    build(tmp_path, "b", only=0)
    artifact = Artifact.open(tmp_path)
    assert artifact.ranks == [0]
    artifact.check([0])
    for use in (lambda: artifact.check([2]), lambda: artifact.rank_info(2), lambda: artifact.check()):
        with pytest.raises(UserError, match=r"rank \d is out of date"):
            use()
    with pytest.raises(UserError, match="has no rank 4"):
        artifact.rank_info(4)


def test_damaged_file_is_named_and_redone(tmp_path: Path) -> None:
    build(tmp_path / "fresh")
    for damage, complaint in [
        (lambda path: path.write_bytes(path.read_bytes().replace(b"of", b"OF")), "SHA-256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.unlink(), "missing"),
    ]:
        build(tmp_path / "engine")
        damage(tmp_path / "engine" / "rank1.onnx")
        artifact = Artifact.open(tmp_path / "engine")
        artifact.check(ranks=[0, 2])
        with pytest.raises(UserError, match=rf"rank1\.onnx: .*{complaint}.*run the compile again") as caught:
            artifact.check()
        assert "\n" not in str(caught.value)
        assert build(tmp_path / "engine") == [1]
        assert tree(tmp_path / "engine") == tree(tmp_path / "fresh")


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return damage


RECORD = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.unlink(), r"has no manifest\.json.*make it with `moecompiler compile"),
        (lambda path: path.write_text("{"), "cannot be read"),
        (lambda path: path.write_bytes(b"\xff"), "cannot be read"),
        (lambda path: path.write_text("[" * 100_000), "cannot be read"),
        (lambda path: path.write_text("[]"), "no manifest of moecompiler"),
        (lambda path: path.write_text('{"name": "a web app"}'), "no manifest of moecompiler"),
        (_edit(lambda data: data.update(format=2)), r"another version of moecompiler \(format 2.*compile again"),
        (_edit(lambda data: data.pop("ranks")), r"damaged \('ranks'\)"),
        (_edit(lambda data: data.update(world_size="4")), "damaged"),
        (_edit(lambda data: data.update(world_size=0)), "damaged"),
        (_edit(lambda data: data["ranks"].update(x=data["ranks"]["0"])), "damaged"),
        (_edit(lambda data: data["ranks"]["0"]["files"].update({"../passwd": RECORD})), r"'\.\./passwd'"),
        (_edit(lambda data: data["files"].update({"/etc/passwd": RECORD})), "'/etc/passwd'"),
        (_edit(lambda data: data["files"].update({"a/../../b": RECORD})), "not a plain path"),
        (_edit(lambda data: data.update(stale=["../precious"])), "not a plain path"),
        (_edit(lambda data: data.update(stale=[MANIFEST])), "kept for bookkeeping"),
        (_edit(lambda data: data["files"].update({"": RECORD})), "not a plain path"),
    ],
)
def test_bad_manifest(tmp_path: Path, damage: Callable[[Path], object], complaint: str) -> None:
    build(tmp_path, world_size=1)
    damage(tmp_path / MANIFEST)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=complaint) as caught:
        Artifact.open(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"directory|--output_dir"):
        build(tmp_path)
    assert tree(tmp_path) == before


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found; make it with `moecompiler export"):
        Artifact.open(tmp_path / "none", ("export",))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a directory"):
        Artifact.open(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        build(tmp_path / "file")


def test_wrong_stage(tmp_path: Path) -> None:
    with writing(tmp_path / "exported", "export", 1, {}):
        pass
    build(tmp_path / "engine")
    with pytest.raises(UserError, match=r"moecompiler build --checkpoint_dir .*exported --output_dir"):
        Artifact.open(tmp_path / "exported", ("engine",))
    with pytest.raises(UserError, match=r"give what `moecompiler export` wrote"):
        Artifact.open(tmp_path / "engine", ("export",))
    assert Artifact.open(tmp_path / "exported", ("export", "optimize")).stage == "export"
    with pytest.raises(UserError, match="holds stage 'export', 'engine' cannot go to the same directory"):
        build(tmp_path / "exported")


def test_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"holds files of someone else \(thesis\.tex\)"):
        build(tmp_path)
    assert tree(tmp_path) == {"below/thesis.tex": b"precious"}


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with writing(tmp_path, "engine", 1, {}) as writer:
        put(writer, "a", "")
        with pytest.raises(UserError, match="another moecompiler is writing there"):
            build(tmp_path)
        assert writer.temp("a").exists()
    build(tmp_path)


def failing_build(directory: Path) -> None:
    with writing(directory, "engine", 4, {"other": 1}) as writer:
        put(writer, "rank0.onnx", "half")
        raise ZeroDivisionError


def test_failure_leaves_nothing_half_made(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        failing_build(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    build(tmp_path, only=0)
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError):
        failing_build(tmp_path)
    assert tree(tmp_path) == before


def test_leftovers_of_a_killed_run_go_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / ".tmp-1-tokenizer.json").touch()  # they can be large: room is needed for the new ones
    (tmp_path / ".lock").touch()
    with writing(tmp_path, "engine", 1, {}):
        assert set(tree(tmp_path)) == {".lock"}
    assert set(tree(tmp_path)) == {MANIFEST}


def test_mistakes_of_the_caller(tmp_path: Path) -> None:
    with writing(tmp_path, "engine", 2, {}) as writer:
        staged = Staged.of(put(writer, "shared", "x"))
        writer.commit_file("shared", staged)
        writer.commit_rank(0, "k", {"a": put(writer, "a", "x")}, {})
        put(writer, "b", "x")
        for mistake in (
            lambda: writer.commit_rank(1, "k", {"a": writer.temp("b")}, {}),
            lambda: writer.commit_rank(1, "k", {"shared": writer.temp("b")}, {}),
            lambda: writer.commit_file("a", writer.temp("b")),
            lambda: writer.commit_rank(2, "k", {}, {}),
            lambda: writer.temp("../b"),
            lambda: writer.commit_file("../b", writer.temp("b")),
        ):
            with pytest.raises(ValueError, match=r"already belongs|rank 2 of 2|plain path"):
                mistake()
    assert set(tree(tmp_path)) == {MANIFEST, "shared", "a"}


def die_at(step: int) -> None:
    """This process kills itself as it is about to change the disk for the ``step``-th time."""
    steps = iter(range(step))

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in ("replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))


def killed_build(directory: Path, step: int, option: str, world_size: int) -> bool:
    """Builds in a forked process that dies at ``step``; False where it was done before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            die_at(step)
            build(directory, option, world_size)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("start", ["nothing", "other options"])
def test_kill_at_every_step(tmp_path: Path, start: str) -> None:
    whole: dict[str, dict[str, bytes]] = {}
    for option, world_size in (("a", 3), ("b", 2)):
        build(tmp_path / option, option, world_size)
        whole[option] = tree(tmp_path / option)
    step, seen = 0, set()
    while True:
        directory = tmp_path / f"killed{step}"
        if start == "other options":
            shutil.copytree(tmp_path / "a", directory)
        if not killed_build(directory, step, "b", 2):
            break
        seen.add(state := state_of(directory, whole))
        committed = committed_ranks(directory) if directory.exists() else []
        if directory.exists():
            shutil.copytree(directory, tmp_path / "back")
        build(tmp_path / "back", "a", 3)
        assert tree(tmp_path / "back") == whole["a"], f"step {step} ({state}), back to the old options"
        shutil.rmtree(tmp_path / "back")
        made = build(directory, "b", 2)
        assert not set(made) & set(committed), f"step {step} ({state}): ranks made twice"
        assert tree(directory) == whole["b"], f"step {step} ({state})"
        assert state_of(directory, whole) == "b is whole"
        step += 1
    assert step >= 20
    assert seen == {"incomplete", "b is whole"} | ({"a is whole"} if start == "other options" else set())


def state_of(directory: Path, whole: dict[str, dict[str, bytes]]) -> str:
    """What a reader finds; a directory that passes its check must be byte for byte one of the ``whole`` ones."""
    complaint = ""
    try:
        artifact = Artifact.open(directory, ("engine",))
        artifact.check()
    except UserError as error:
        complaint = str(error)
    if complaint:
        assert "\n" not in complaint
        assert "run it again" in complaint or "make it with" in complaint, complaint
        return "incomplete"
    option = artifact.header["option"]
    for name in artifact.manifest.named_files():
        assert artifact.path(name).read_bytes() == whole[option][name]
    return f"{option} is whole"


def committed_ranks(directory: Path) -> list[int]:
    manifest = directory / MANIFEST
    if not manifest.exists() or json.loads(manifest.read_text())["header"]["option"] != "b":
        return []
    return Artifact.open(directory).ranks


def test_kill_at_random_moments(tmp_path: Path) -> None:
    build(tmp_path / "whole", world_size=6)
    whole = {"a": tree(tmp_path / "whole")}
    code = "import sys, pathlib, test_artifact as t; print(flush=True); t.build(pathlib.Path(sys.argv[1]), 'a', 6, delay=0.02)"
    chance = random.Random(0)
    directory = tmp_path / "killed"
    made: list[int] = []
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, cwd=Path(__file__).parent
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(chance.uniform(0.01, 0.15))
            child.kill()
        state_of(directory, whole)
        done = Artifact.open(directory).ranks if (directory / MANIFEST).exists() else []
        assert set(made) <= set(done), "what was committed stays"
        made = done
    assert not set(build(directory, world_size=6)) & set(made)
    assert tree(directory) == whole["a"]


def test_files_that_ranks_share(tmp_path: Path) -> None:
    """Belong to each of them, stay as long as one of them names them, and are told to who comes later."""

    def commit(writer: ArtifactWriter, rank: int, shared: dict[str, Path | None]) -> None:
        name = f"rank{rank}.weights"
        writer.commit_rank(rank, "key", {name: put(writer, name, "own")}, {}, shared)

    with writing(tmp_path / "a", "engine", 3, {}) as writer:
        assert writer.whole_files("x.") == []
        with pytest.raises(ValueError, match=r"no rank has x.plan"):
            commit(writer, 0, {"x.plan": None})
        commit(writer, 0, {"x.plan": put(writer, "x.plan", "plan")})
        commit(writer, 1, {"x.plan": None})
        with pytest.raises(ValueError, match=r"x\.plan already belongs"):
            writer.commit_rank(2, "key", {"x.plan": put(writer, "x.plan", "mine")}, {})
        commit(writer, 2, {"y.plan": put(writer, "y.plan", "other")})
    artifact = Artifact.open(tmp_path / "a")
    artifact.check()
    assert [set(artifact.rank_files(rank)) for rank in (0, 1)] == [{f"rank{r}.weights", "x.plan"} for r in (0, 1)]
    with writing(tmp_path / "a", "engine", 3, {}) as writer:
        assert writer.whole_files("x.") == ["x.plan"]
        commit(writer, 0, {})  # is built otherwise now
        commit(writer, 2, {})
        assert (tmp_path / "a" / "x.plan").exists()
        assert not (tmp_path / "a" / "y.plan").exists()
        (tmp_path / "a" / "x.plan").write_text("damaged")
        assert not writer.is_done(1, "key")
        assert writer.whole_files("x.") == []
        commit(writer, 0, {"x.plan": put(writer, "x.plan", "anew")})
        commit(writer, 1, {"x.plan": None})
    Artifact.open(tmp_path / "a").check([0, 1])
