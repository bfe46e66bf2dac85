"""What ``gpu_check`` runs and writes; nothing here needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression

from moecompiler.tools.gpu_check import ROOT, every_step, figures, line, main, pack_logs, run, select, summary
from moecompiler.tools.gpu_kinds import KINDS, QUANTIZED
from moecompiler.tools.gpu_schedule import OK, SKIPPED, TIMED_OUT, Outcome, Step, check
from moecompiler.tools.gpu_steps import Places, split
from moecompiler.tools.gpu_versions import versions
from moecompiler.tools.main import main as command

STEPS = every_step(Places(ROOT, Path("/work-dir")))
NAMES = [step.name for step in STEPS]


def names(only: str = "", skip: str = "") -> list[str]:
    return [step.name for step in select(STEPS, only, skip)]


def test_steps_are_in_order() -> None:
    check(STEPS)
    assert not [step.name for step in STEPS if step.group == "figures" and not step.alone]


def test_every_kind_is_built_validated_and_read() -> None:
    for kind in KINDS:
        assert {f"compile-{kind.name}", f"validate-{kind.name}", f"text-{kind.name}"} <= set(NAMES)
    assert {kind.mapping for kind in KINDS if kind.dtype == "bfloat16"} == {"one", "tp2", "ep2", "pp2"}


def test_every_format_is_built_with_plugins_and_without() -> None:
    """And both are compared, once both are there; those with static scales use the same ones."""
    found = {step.name: step for step in STEPS}
    for name in QUANTIZED:
        pair = tuple(f"compile-q-{name}-{plugins}" for plugins in ("on", "off"))
        on, off = (found[each].command for each in pair)
        assert [(a, b) for a, b in zip(on, off, strict=True) if a != b] == [
            (f"/work-dir/engines/q-{name}-on", f"/work-dir/engines/q-{name}-off"),
            ("on", "off"),
        ]
        assert ("--scales" in on) == (found[pair[0]].needs == ("q-scales",)) == ("fp8" in name or "kv" in name)
        assert found[f"q-text-{name}"].needs == pair
        assert f"validate-q-{name}-on" in found


@pytest.mark.parametrize("name", QUANTIZED)
def test_compiles_of_formats_are_ones_that_the_command_line_takes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They end at what is not there, not at an option."""
    (words,) = (step.command[3:] for step in STEPS if step.name == f"compile-q-{name}-on")
    assert command([*words, "--only_pass", "no-such-pass"]) == 2
    missing = "/q-scales: not found" if "--scales" in words else "no-such-pass"
    assert missing in capsys.readouterr().err


def test_parts_of_a_test_file_are_all_of_it_and_each_test_once() -> None:
    names = ["test_a[int8]", "test_a[fp8]", "test_b[int8-fp8]", "test_c[]"]
    expressions = [Expression.compile(each) for each in split(("int8", "fp8 or fp4"))]
    chosen = [[each.evaluate(lambda word, name=name, **_: word in name) for each in expressions] for name in names]
    assert chosen == [[True, False, False], [False, True, False], [True, False, False], [False, False, True]]


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_scripts_and_tests_are_there(step: Step) -> None:
    if step.command[1] == "-m" and step.command[2].startswith("moecompiler.tools."):
        assert (ROOT / "tools" / f"{step.command[2].rpartition('.')[2]}.py").is_file()
    for word in step.command:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).is_file()


def test_only_brings_what_is_needed() -> None:
    assert names("validate-float16-on-tp2") == ["compile-float16-on-tp2", "validate-float16-on-tp2"]
    assert names("validate-float16-on-tp2", "compile-*") == ["validate-float16-on-tp2"]
    assert names("overhead, moe*") == [n for n in NAMES if n.startswith("moe") or n == "overhead"]
    assert "soak" in names("correctness")
    assert "moe" not in names("correctness")
    assert {"compile-float16-on-one", "moe"} <= set(names("figures"))
    assert names() == NAMES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--output_dir", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "no CUDA GPU can be used here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--only", "valdate-*"], ["--skip", "nothing"], ["--jobs", "0"], []])
def test_what_is_wrong_is_said(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, *(["--output_dir", str(tmp_path / "out")] if words else [])])
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "text-float16-on-one"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["compile-float16-on-one", "correctness"]
    assert second.split()[-1] == "compile-float16-on-one"


def script(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Good and bad steps; figures of those that wrote some, logs of those that ran."""
    out, work = tmp_path / "out", tmp_path / "work"
    (work / "figures").mkdir(parents=True)
    (work / "figures" / "slow.json").write_text("[0]")  # of an earlier run
    good = str(work / "figures" / "good.json")
    steps = [
        Step("good", "a", script(f"open({good!r}, 'w').write('[1.5]'); print('fine')"), 20),
        Step("bad", "a", script("print('alas'); raise SystemExit(4)"), 20),
        Step("hopeless", "a", script("print('never')"), 20, ("bad",)),
        Step("slow", "b", script("import time; time.sleep(30)"), 1, ("good",), alone=True),
    ]
    status = run(steps, Places(ROOT, work), out, jobs=2, minutes=1)
    printed = capsys.readouterr().out.splitlines()
    assert status == 1
    assert sorted(line.split()[0] for line in printed[:-1]) == ["FAIL", "SKIP", "TIME", "ok"]
    assert printed[-1].startswith("1 failed, 1 ok, 1 skipped, 1 timed out in ")
    report = json.loads((out / "summary.json").read_text())
    assert report["counts"] == {"failed": 1, "ok": 1, "skipped": 1, "timed out": 1}
    assert next(each for each in report["steps"] if each["name"] == "bad")["last"] == "alas"
    assert json.loads((out / "figures.json").read_text()) == {"good": [1.5]}
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["logs/bad.log", "logs/good.log", "logs/slow.log"]
    assert {path.name for path in out.iterdir()} == {"summary.json", "figures.json", "logs.tar.gz"}


def test_parts(tmp_path: Path) -> None:
    outcomes = [
        Outcome("a", OK, 0, 1.26, "x" * 400),
        Outcome("b", TIMED_OUT, None, 2.0, ""),
        Outcome("c", SKIPPED, None, 0, "no"),
    ]
    assert summary(outcomes, 3.14159)["counts"] == {OK: 1, SKIPPED: 1, TIMED_OUT: 1}
    assert [line(each).split()[0] for each in outcomes] == ["ok", "TIME", "SKIP"]
    assert len(line(outcomes[0])) < 200
    (tmp_path / "a.json").write_text("{")
    assert figures(tmp_path, [Step("a", "g", (), 1), Step("b", "g", (), 1)]) == {"a": None}
    pack_logs(tmp_path / "logs.tar.gz", tmp_path, [])


def test_versions_and_what_is_missing() -> None:
    found, missing = versions(("pytest", "no_such_module"))
    assert found == {"pytest": pytest.__version__}
    assert missing == {"no_such_module": "ModuleNotFoundError: No module named 'no_such_module'"}


def test_runs_as_a_file() -> None:
    done = subprocess.run([sys.executable, "tools/gpu_check.py", "--list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(NAMES)
