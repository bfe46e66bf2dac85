"""``moecompiler calibrate``: files, cache, report, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import edit, save_hf, tiny_config
from cli import TINY_MIXTRAL, Here

from moecompiler.calibration.files import FILE, JSON_FILE, read_calibration

SMALL = ("--calib_size", 4, "--calib_max_seq_length", 64)


def test_files_cache_and_report(here: Here, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    first = here("calibrate", "--model_dir", TINY_MIXTRAL, "--output_dir", folder, *SMALL, "--calib_min_tokens", 40)
    assert (first.status, first.err) == (0, "")
    assert "tokens by expert" in first.out
    assert "calibrated on 256 tokens, 4 samples" in first.out
    found = read_calibration(folder)
    fed = sum(each.fed for each in found.experts.values())
    assert 0 < fed < 32
    assert sum(each.tokens for each in found.experts.values()) == 256 * 2 * 4
    assert f"* too few ({fed} experts): statistics are of all tokens" in first.out
    content = {name: (folder / name).read_bytes() for name in (FILE, JSON_FILE)}

    stamp = (folder / FILE).stat().st_mtime_ns
    again = here(
        "calibrate", "--model_dir", TINY_MIXTRAL, "--output_dir", folder, *SMALL, "--calib_min_tokens", 40, "--json"
    )
    assert again.err == f"note: {folder} is up to date: the same model, text and options\n"
    assert (folder / FILE).stat().st_mtime_ns == stamp
    assert json.loads(again.out) == json.loads(content[JSON_FILE])

    # other options, then the first ones: the same bytes
    other = here("calibrate", "--model_dir", TINY_MIXTRAL, "--output_dir", folder, *SMALL)
    assert (other.status, other.err) == (0, "")
    assert {name: (folder / name).read_bytes() for name in content} != content
    here("calibrate", "--model_dir", TINY_MIXTRAL, "--output_dir", folder, *SMALL, "--calib_min_tokens", 40)
    assert {name: (folder / name).read_bytes() for name in content} == content
    assert sorted(path.name for path in folder.iterdir()) == [FILE, JSON_FILE]


def test_text_of_ones_own_and_dummy_weights(here: Here, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "text.jsonl").write_text('{"text": "the first"}\n{"text": "and the second"}\n')
    words = ("--model", tmp_path / "config.json", "--num_layers", 1, "--calib_dataset", tmp_path / "text.jsonl")
    done = here("calibrate", *words, "--output_dir", tmp_path / "made", "--dtype", "float16", "--json")
    assert done.status == 0
    assert "bytes are taken for tokens" in done.err
    assert "text.jsonl gives 2 of --calib_size 512 samples, 23 tokens" in done.err
    data = json.loads(done.out)
    assert data["header"]["text"]["tokens"] == 23
    assert data["header"]["options"]["dtype"] == "float16"
    assert len(data["experts"]) == 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_hf(tmp_path / "model", tiny_config(num_hidden_layers=1), tokenizer=True)


def test_a_calibration_of_another_model_is_kept(here: Here, tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "made"
    assert here("calibrate", "--model_dir", model, "--output_dir", folder, *SMALL).status == 0
    before = (folder / FILE).read_bytes()
    edit(model, lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    refused = here("calibrate", "--model_dir", model, "--output_dir", folder, *SMALL)
    assert refused.status == 2
    assert refused.err.startswith(
        f"moecompiler: error: {folder / FILE}: is the calibration of another model; calibrate"
    )
    assert (folder / FILE).read_bytes() == before
    (folder / FILE).write_bytes(before[:100])
    refused = here("calibrate", "--model_dir", model, "--output_dir", folder, *SMALL)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "cannot be read as safetensors" in refused.err
    assert "remove it, or give another --output_dir" in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--calib_size", 0), "--calib_size 0: give 1 or more samples"),
        (("--calib_max_seq_length", 129), "--calib_max_seq_length 129: give 1 to 128"),
        (("--calib_min_tokens", 0), "--calib_min_tokens 0: give 1 or more"),
        (("--calib_dataset", "{tmp}/empty.txt"), "holds no text; give some to calibrate on"),
        (("--calib_dataset", "{tmp}/model/model.safetensors"), "is not text"),
        (("--calib_dataset", "{tmp}/nowhere"), "not found"),
        (("--tokenizer_dir", "{tmp}"), "holds no tokenizer"),
        (("--device", "cuda"), "--device cuda: torch finds no CUDA GPU here"),
        (("--output_dir", "{tmp}/empty.txt"), "cannot be made"),
    ],
)
def test_one_line_for_what_cannot_be(
    here: Here, tmp_path: Path, model: Path, words: tuple[object, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "empty.txt").write_text("\n")
    given = [str(word).format(tmp=tmp_path) for word in words]
    sizes = () if "--calib_max_seq_length" in words or "--calib_size" in words else SMALL
    refused = here("calibrate", "--model_dir", model, "--output_dir", tmp_path / "made", *sizes, *given)
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith("moecompiler: error: ")
    assert refused.err.count("\n") == 1
    assert said in refused.err
    assert not (tmp_path / "made" / FILE).exists()


def test_numbers_that_are_none_leave_no_file(here: Here, tmp_path: Path, model: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit(model, lambda tensors: tensors[name].__setitem__((0, 0), float("inf")))
    refused = here("calibrate", "--model_dir", model, "--output_dir", tmp_path / "made", *SMALL)
    assert refused.status == 2
    assert "model.layers.0: its activations are NaN or infinite" in refused.err
    assert list((tmp_path / "made").iterdir()) == []
