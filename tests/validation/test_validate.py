"""The verb ``validate``: sound engines pass, a wrong weight is caught and its layer and rank named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from corrupt import with_swapped_gate_and_up

from moecompiler.tools.main import main

pytestmark = pytest.mark.xdist_group("validation")


def validate(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["validate", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_sound_engines_pass(two_ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = validate(capsys, two_ranks, "--layers", "--json", "--output_json", tmp_path / "report.json")
    report = json.loads(out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert status == 0
    assert report["passed"]
    assert {each["rank"] for each in report["outputs"]} == {0, 1}
    assert {each["scenario"] for each in report["outputs"]} == {"random", "text"}
    assert {each["name"] for each in report["outputs"]} >= {"logits", "present.0.key", "present.3.value"}
    assert max(each["max_abs"] for each in report["outputs"]) < 2e-4
    parts = [each["module"] for each in report["parts"] if each["rank"] == 0]
    assert parts[0] == "model.embed_tokens"
    assert parts[-1] == "lm_head"
    assert len(parts) == 2 + 2 * 4


def test_against_hf(two_ranks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ranks together are HF's model: logits within 2e-4, and the held-out text as likely."""
    report = json.loads(validate(capsys, two_ranks, "--json")[1])
    text = next(each for each in report["quality"] if each["scenario"] == "text")
    assert text["tokens"] > 500
    assert text["max_abs"] < 2e-4
    assert text["kl"] < 1e-6
    assert text["top1"] == 1.0
    assert text["perplexity"] == pytest.approx(text["hf_perplexity"], rel=1e-5)
    assert 4 < text["perplexity"] < 10  # the model card says 7.2 on the whole text


@pytest.mark.parametrize(("rank", "layer"), [(1, 2), (0, 3)])
def test_swapped_gate_and_up_is_found(
    two_ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int, layer: int
) -> None:
    broken = with_swapped_gate_and_up(two_ranks, tmp_path / "broken", rank, layer, local_expert=1)
    status, out = validate(capsys, broken, "--no_hf")
    assert status == 1
    assert f"the error enters in model.layers.{layer}.mlp on rank {rank}" in " ".join(out.split())


def test_only_the_broken_part_fails(two_ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = with_swapped_gate_and_up(two_ranks, tmp_path / "broken", 1, 2, local_expert=0)
    report = json.loads(validate(capsys, broken, "--no_hf", "--json")[1])
    failed = {(each["module"], each["rank"]) for each in report["parts"] if not each["passed"]}
    assert failed == {("model.layers.2.mlp", 0), ("model.layers.2.mlp", 1)}  # the sum is wrong on both …
    own = {each["rank"]: each["own_relative"] for each in report["parts"] if each["module"] == "model.layers.2.mlp"}
    assert own[0] < 1e-5 < 1e-2 < own[1]  # … and one of them made it so


def test_float16_passes_and_a_wrong_expert_in_it_is_found(
    two_ranks_float16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token that rounding sends to another expert is an outlier; all tokens of an expert are not."""
    assert validate(capsys, two_ranks_float16, "--layers")[0] == 0
    broken = with_swapped_gate_and_up(two_ranks_float16, tmp_path / "broken", 0, 2, local_expert=3)
    status, out = validate(capsys, broken)
    assert status == 1
    assert "the error enters in model.layers.2.mlp on rank 0" in " ".join(out.split())


def test_without_an_all_reduce_the_layer_is_named_too(
    one_rank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = with_swapped_gate_and_up(one_rank, tmp_path / "broken", 0, 1, local_expert=6)
    status, out = validate(capsys, broken)
    assert status == 1
    assert "the error enters in model.layers.1.mlp on rank 0" in " ".join(out.split())


def test_a_changed_file_is_refused_before_anything_runs(
    two_ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = with_swapped_gate_and_up(two_ranks, tmp_path / "broken", 1, 2, local_expert=0)
    (broken / "manifest.json").write_text((two_ranks / "manifest.json").read_text())
    assert main(["validate", str(broken)]) == 2
    error = capsys.readouterr().err
    assert "rank1.safetensors" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--tokens", "0"], "--tokens 0"),
        (["--tokenizer_dir", "nowhere"], "tokenizer"),
        (["--output_json", "/dev/null/report.json"], "--output_json"),
    ],
)
def test_bad_input(one_rank: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["validate", str(one_rank), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.mpi
def test_under_mpirun(two_ranks: Path) -> None:
    """One process per rank gives the same report, printed once."""
    mpirun = [Path(sys.executable).parent / "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    verb = [sys.executable, "-m", "moecompiler.tools.main", "validate", two_ranks, "--json", "--no_hf"]
    done = subprocess.run([*map(str, mpirun), *map(str, verb)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {each["rank"] for each in json.loads(done.stdout)["outputs"]} == {0, 1}
