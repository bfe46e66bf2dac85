"""``run`` under ``mpirun`` with something wrong: one line, exit status 2, and nobody left after a moment."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import PROMPT, SOON, Here, Output, under_mpi
from tokenizers import Tokenizer, models

Engines = Callable[[str], Path]
pytestmark = [pytest.mark.xdist_group("errors"), pytest.mark.timeout(120)]


@pytest.fixture
def copy(engines: Engines, tmp_path: Path) -> Path:
    """Engines of two ranks that may be damaged."""
    return shutil.copytree(engines("ep2"), tmp_path / "engines")


def run(engine_dir: Path, *more: object, ranks: int = 2, text: str = PROMPT) -> Output:
    return under_mpi(ranks, "run", "--engine_dir", engine_dir, "--max_output_len", 4, *more, "--input_text", text)


def assert_refused(output: Output, said: str) -> None:
    assert output.status == 2
    assert output.own_lines == output.complaints  # no traceback, no warning
    (line,) = output.complaints
    assert said in line
    assert output.out == ""
    assert output.seconds < SOON


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 3])
def test_wrong_number_of_processes(ranks: int, engines: Engines) -> None:
    output = run(engines("ep2"), ranks=ranks)
    assert_refused(output, f"was compiled for 2 rank(s) (tp2·moe_ep2), but {ranks} run: start it with `mpirun -n 2`")


@pytest.mark.mpi
def test_a_rank_s_file_is_missing(copy: Path) -> None:
    (copy / "rank1.onnx").unlink()
    assert_refused(run(copy), f"rank 1 on {platform.node()}: {copy}/rank1.onnx: missing; run the compile again")


@pytest.mark.mpi
def test_a_file_was_tampered_with(copy: Path) -> None:
    file = copy / "rank0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert_refused(run(copy), "rank0.safetensors: its SHA-256 is not the recorded one")


@pytest.mark.mpi
def test_made_by_another_version(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 999}))
    assert_refused(run(copy), "made by another version of moecompiler (format 999")


@pytest.mark.mpi
def test_a_prompt_longer_than_the_engine_takes(engines: Engines) -> None:
    assert_refused(run(engines("ep2"), text="x = 1; " * 40), "more than the engine's max_input_len 64")


@pytest.mark.mpi
def test_more_output_than_the_engine_holds(engines: Engines) -> None:
    assert_refused(run(engines("ep2"), "--max_output_len", 128), "more than the engine's max_seq_len 128")


@pytest.mark.mpi
def test_an_empty_prompt(engines: Engines) -> None:
    assert_refused(run(engines("ep2"), text=""), "--input_text: prompt 1 is empty")


@pytest.mark.mpi
def test_a_tokenizer_of_another_model(engines: Engines, tmp_path: Path) -> None:
    vocabulary = {f"t{i}": i for i in range(5000)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(tmp_path / "tokenizer.json"))
    output = run(engines("ep2"), "--tokenizer_dir", tmp_path)
    assert_refused(output, "its tokenizer does not fit: it has 5000 tokens, the model only")


@pytest.mark.mpi
def test_a_file_that_cannot_be_written(engines: Engines) -> None:
    assert_refused(
        run(engines("ep2"), "--output_npy", "/dev/null/ids.npy"), "--output_npy /dev/null/ids.npy: cannot be written"
    )


@pytest.mark.mpi
def test_an_option_that_there_is_not(engines: Engines) -> None:
    # found before MPI starts, so that a rank may be ended by the launcher before it can say so
    output = run(engines("ep2"), "--num_beams", 4)
    assert output.status == 2
    assert output.own_lines == output.complaints
    assert 1 <= len(output.complaints) <= 2
    assert "No such option: --num_beams" in output.complaints[0]
    assert output.seconds < SOON


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "give prompts with --input_text or with --input_file"),
        (("--input_text", "x", "--input_file", "prompts.txt"), "give prompts with --input_text or with --input_file"),
        (("--input_text", "x", ""), "--input_text: prompt 2 is empty"),
        (("--input_file", "nothing.txt"), "nothing.txt: not found; --input_file takes .txt, .csv or .npy"),
        (("--input_file", "letters.csv"), "letters.csv: row 1 holds something else than token ids"),
        (("--input_file", "large.csv"), "holds token id 99999; the model has 0 to"),
        (("--input_text", "x", "--temperature", -1), "--temperature -1.0: give a positive number"),
        (("--input_text", "x", "--top_p", 2), "--top_p 2.0: give a probability"),
        (("--input_text", "x", "--max_output_len", 0), "--max_output_len 0"),
        (("--input_text", "x", "--tokenizer_dir", "nowhere"), "--tokenizer_dir nowhere: no such folder"),
    ],
)
@pytest.mark.parametrize("name", ["one", "ep2"])
def test_requests_that_make_no_sense(
    name: str,
    more: tuple[object, ...],
    said: str,
    engines: Engines,
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters.csv").write_text("1,two\n")
    (tmp_path / "large.csv").write_text("1,99999\n")
    in_process = ("--in_process",) if name == "ep2" else ()
    output = here("run", "--engine_dir", engines(name), "--max_output_len", 4, *more, *in_process)
    assert (output.status, output.out) == (2, "")
    assert output.err.splitlines() == output.complaints
    assert len(output.complaints) == 1
    assert said in output.err


def test_what_is_not_an_engine_directory(engines: Engines, here: Here, tmp_path: Path) -> None:
    wrong = {
        engines("one") / "export": "holds stage 'export' where 'engine' is needed: run `moecompiler build",
        engines("one") / "optimize": "holds stage 'optimize' where 'engine' is needed: run `moecompiler build",
        tmp_path: "has no manifest.json",
    }
    for directory, said in wrong.items():
        output = here("run", "--engine_dir", directory, "--max_output_len", 4, "--input_text", "x")
        assert output.status == 2
        assert said in output.complaints[0]
