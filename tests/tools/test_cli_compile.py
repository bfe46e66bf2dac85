"""``compile`` and its parts: what is done again and what is not, one rank at a time, ranks that fail, and ``inspect``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import save_hf, tiny_config
from cli import ONE_RANK, PROMPT, TINY_MIXTRAL, TWO_RANKS, Here, contents
from safetensors.torch import load_file, save_file

from moecompiler.tools.main import main

Engines = Callable[[str], Path]
pytestmark = pytest.mark.xdist_group("compile")


@pytest.fixture
def copy(engines: Engines, tmp_path: Path) -> Path:
    """Engines of one rank that may be compiled again."""
    return shutil.copytree(engines("one"), tmp_path / "engines")


def times(directory: Path) -> dict[str, int]:
    """When each file but the manifests was written."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in files}


def compile_(here: Here, directory: Path, *options: object, model_dir: Path = TINY_MIXTRAL) -> None:
    output = here("compile", "--model_dir", model_dir, "--output_dir", directory, *options)
    assert output.status == 0, output.err


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_compiling_again_does_nothing(copy: Path, here: Here) -> None:
    before, files = times(copy), contents(copy)
    compile_(here, copy, *ONE_RANK)
    assert changed(before, times(copy)) == set()
    assert contents(copy) == files


def test_a_limit_that_no_file_depends_on(copy: Path, here: Here) -> None:
    before = times(copy)
    compile_(here, copy, *ONE_RANK, "--max_batch_size", 5, "--max_input_len", 40)
    assert changed(before, times(copy)) == set()
    limits = json.loads(here("inspect", copy, "--json").out)["limits"]
    assert (limits["max_batch_size"], limits["max_input_len"]) == (5, 40)


def test_another_pipeline_exports_nothing(copy: Path, here: Here) -> None:
    before = times(copy)
    compile_(here, copy, *ONE_RANK, "--pipeline", "debug")
    touched = changed(before, times(copy))
    assert "rank0.onnx" in touched
    assert not any(name.startswith(("export/", "tokenizer/")) for name in touched)
    assert json.loads(here("inspect", copy, "--json").out)["ranks"][0]["passes"] == []


def test_weights_that_changed_are_built_again(copy: Path, here: Here, tmp_path: Path) -> None:
    model_dir = shutil.copytree(TINY_MIXTRAL, tmp_path / "model")
    compile_(here, copy, *ONE_RANK, model_dir=model_dir)
    before = times(copy)
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, model_dir / "model.safetensors")
    os.utime(model_dir / "model.safetensors", (1, 1))
    compile_(here, copy, *ONE_RANK, model_dir=model_dir)
    assert {"rank0.safetensors"} <= changed(before, times(copy)) <= {"rank0.safetensors", "rank0.onnx"}


def test_one_rank_at_a_time(engines: Engines, here: Here, tmp_path: Path) -> None:
    directory = tmp_path / "engines"
    shutil.copytree(engines("ep2") / "export", directory / "export")  # exported already, which takes seconds
    compile_(here, directory, *TWO_RANKS, "--rank", 1)
    assert [each["rank"] for each in json.loads(here("inspect", directory, "--json").out)["ranks"]] == [1]
    refused = here("run", "--engine_dir", directory, "--max_output_len", 1, "--input_text", "x", "--in_process")
    assert refused.status == 2
    assert "rank 0 is missing" in refused.err
    compile_(here, directory, *TWO_RANKS, "--rank", 0)
    assert contents(directory) == contents(engines("ep2"))


def test_step_by_step_or_at_once(engines: Engines, here: Here, tmp_path: Path) -> None:
    exported, optimized, built = engines("one") / "export", tmp_path / "optimized", tmp_path / "built"
    assert here("optimize", "--checkpoint-dir", exported, "--output-dir", optimized).status == 0
    assert contents(optimized) == contents(engines("one") / "optimize")
    limits = ("--max_input_len", 64, "--max_batch_size", 3)
    assert here("build", "--checkpoint_dir", optimized, "--output_dir", built, *limits).status == 0
    at_once = {
        name: data for name, data in contents(engines("one")).items() if not name.startswith(("export/", "opti"))
    }
    assert contents(built) == at_once


def test_a_rank_that_fails_leaves_nothing_half_made(here: Here, tmp_path: Path) -> None:
    model_dir = shutil.copytree(TINY_MIXTRAL, tmp_path / "model")
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.7.w2.weight"][3, 5] = 1e6  # an expert of rank 1
    save_file(tensors, model_dir / "model.safetensors")
    directory = tmp_path / "engines"
    options = ("--model_dir", model_dir, "--output_dir", directory, *TWO_RANKS, "--dtype", "float16")
    output = here("compile", *options, "--num_layers", 1, "--workers", 2)
    assert output.status == 2
    (line,) = output.err.splitlines()
    assert "rank 1: model.layers.0.block_sparse_moe.experts.7.w2.weight: holds values beyond float16's range" in line

    stages = [directory / "export", directory / "optimize", directory]
    for stage in stages:
        manifest = json.loads((stage / "manifest.json").read_text()) if (stage / "manifest.json").exists() else {}
        ranks = manifest.get("ranks", {}).values()
        named = {name for record in ranks for name in record["files"]} | manifest.get("files", {}).keys()
        assert {path.name for path in stage.iterdir() if path.is_file()} - {"manifest.json"} == named
    refused = here("run", "--engine_dir", directory, "--max_output_len", 1, "--input_text", "x", "--in_process")
    assert refused.status == 2
    assert len(refused.complaints) == 1


def test_a_directory_of_someone_else_is_left_alone(engines: Engines, here: Here, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    compiled = here("compile", "--model_dir", TINY_MIXTRAL, "--output_dir", tmp_path, *ONE_RANK)
    built = here("build", "--checkpoint_dir", engines("one") / "export", "--output_dir", tmp_path)
    for output in (compiled, built):
        assert output.status == 2
        assert "holds files of someone else (thesis.txt)" in output.err
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_directory_of_another_step_is_left_alone(copy: Path, here: Here) -> None:
    before = contents(copy)
    output = here("compile", "--model_dir", TINY_MIXTRAL, "--output_dir", copy / "export", *ONE_RANK)
    assert output.status == 2
    assert "holds stage 'export' where 'engine' is needed" in output.err
    assert contents(copy) == before


def test_dummy_weights(engines: Engines, here: Here, tmp_path: Path) -> None:
    described = json.loads(here("inspect", engines("endless"), "--json").out)
    assert described["weights_from"] == "dummy weights of seed 0"
    (tmp_path / "ids.csv").write_text("5,6,7\n")
    run = ("run", "--engine_dir", engines("endless"), "--max_output_len", 3, "--in_process")
    assert len(here(*run, "--input_file", tmp_path / "ids.csv").out.split()) == 3
    refused = here(*run, "--input_text", PROMPT)
    assert refused.status == 2
    assert "there is no tokenizer beside the engine" in refused.err


def test_inspect(engines: Engines, here: Here) -> None:
    described = json.loads(here("inspect", engines("tp2-pp2"), "--json").out)
    assert (described["stage"], described["world_size"], described["backend"]) == ("engine", 4, "onnxruntime")
    assert described["mapping"] == {"tp_size": 2, "pp_size": 2, "moe_tp_size": 2, "moe_ep_size": 1}
    assert described["weights_from"] == str(TINY_MIXTRAL)
    assert [each["layers"] for each in described["ranks"]] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    first, *_, last = described["ranks"]
    assert first["inputs"][0] == "input_ids: int64 [batch, sequence]"
    assert last["inputs"][0].startswith("hidden_states: float [batch, sequence, ")
    assert last["outputs"][0].startswith("logits: float [batch, ")
    assert first["files"]["rank0.safetensors"] > 1_000_000
    assert first["weights"] == "rank0.safetensors"
    assert first["passes"][0]["matches"] > 100
    assert sum(count for op, count in first["ops"].items() if op.endswith("AllReduce")) == 5

    text = here("inspect", engines("tp2-pp2")).out
    for part in ("rank 3", "layers 2 to 3", "rank3.safetensors", "pass constant-folding", "logits: float"):
        assert part in text


def test_inspect_what_export_wrote(engines: Engines, here: Here) -> None:
    described = json.loads(here("inspect", engines("ep2") / "export", "--json").out)
    assert (described["stage"], described["backend"], described["limits"]) == ("export", None, None)
    assert {each["weights"] for each in described["ranks"]} == {f"by reference in {TINY_MIXTRAL}"}


def test_a_checkpoint_without_tokenizer_is_validated_on_random_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(tmp_path / "model", tiny_config(num_hidden_layers=1, max_position_embeddings=32))
    engines = tmp_path / "engines"
    assert main(["compile", "--model_dir", str(tmp_path / "model"), "--output_dir", str(engines)]) == 0
    assert not (engines / "tokenizer").exists()
    capsys.readouterr()
    assert main(["validate", str(engines), "--json"]) == 0
    captured = capsys.readouterr()
    assert "there is no tokenizer: measured on random tokens only" in captured.err
    assert {each["scenario"] for each in json.loads(captured.out)["outputs"]} == {"random"}
