"""Calibrations as files: what is read is what was written, and nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moecompiler.calibration.files import FILE, JSON_FILE, read_calibration, write_calibration
from moecompiler.calibration.result import Calibration, ExpertTokens
from moecompiler.errors import UserError

EXPERT = "model.layers.0.block_sparse_moe.experts.3"
FOUND = Calibration(
    {f"{EXPERT}.w1": float(np.float32(0.1)), f"{EXPERT}.w2": 0.0},
    {f"{EXPERT}.w1": np.array([0.1, 0.2, 3], np.float32)},
    {"model.layers.0.self_attn": 5.5},
    {"model.layers.0.self_attn": 0.25},
    {EXPERT: ExpertTokens(3, True), f"{EXPERT}1": ExpertTokens(0, False)},
    {"model_fingerprint": "abc", "options": {"é": 1}},
)


def test_both_files_are_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    write_calibration(folder, FOUND)
    assert sorted(path.name for path in folder.iterdir()) == [FILE, JSON_FILE]
    for path in (folder, folder / FILE, folder / JSON_FILE):
        read = read_calibration(path)
        assert read.header == dict(FOUND.header) | {"format": "moecompiler.calibration", "version": 1}
        for part in ("input_amax", "keys", "values", "experts"):
            assert getattr(read, part) == getattr(FOUND, part)
        means = {} if path.suffix == ".json" else FOUND.input_mean
        assert read.input_mean.keys() == means.keys()
        for name, mean in means.items():
            np.testing.assert_array_equal(read.input_mean[name], mean)
        again = folder / "again"
        write_calibration(again, replace(read, input_mean=FOUND.input_mean))
        assert (again / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_scales() -> None:
    assert FOUND.input_scale(f"{EXPERT}.w1") == np.float32(0.1) / np.float32(448)
    assert FOUND.input_scale(f"{EXPERT}.w2") == 1  # what was always 0 is so with any scale
    assert FOUND.cache_scales("model.layers.0.self_attn", 127) == (
        np.float32(5.5) / np.float32(127),
        np.float32(0.25) / 127,
    )
    with pytest.raises(UserError, match=rf"the calibration: has no statistics of {EXPERT}\.w3; calibrate"):
        FOUND.input_scale(f"{EXPERT}.w3")
    FOUND.check_model("abc")
    with pytest.raises(UserError, match="is the calibration of another model"):
        FOUND.check_model("abd")


def test_what_is_no_calibration(tmp_path: Path) -> None:
    write_calibration(tmp_path, FOUND)
    whole, text = (tmp_path / FILE).read_bytes(), (tmp_path / JSON_FILE).read_text()
    for name, content, said in (
        (FILE, whole[:-5], "cannot be read as safetensors"),
        (FILE, b"", "cannot be read as safetensors"),
        (FILE, whole.replace(b"moecompiler.calibration", b"something.calibrationxx"), "is no calibration"),
        (JSON_FILE, b"[1]", "is no calibration"),
        (JSON_FILE, b"{", "cannot be read as JSON"),
        (JSON_FILE, text.replace('"version": 1', '"version": 2').encode(), "is of version 2, here it is 1"),
        (JSON_FILE, text.replace("keys_amax", "kyes_amax").encode(), "is damaged"),
        (JSON_FILE, text.replace("5.5", '"x"').encode(), "is damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_calibration(tmp_path / name)
    with pytest.raises(UserError, match=r"not found; make it with"):
        read_calibration(tmp_path / "x.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"holds neither {FILE} nor {JSON_FILE}"):
        read_calibration(tmp_path / "empty")


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()  # a directory in the file's place
    with pytest.raises(UserError, match="cannot be written"):
        write_calibration(tmp_path, FOUND)
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, JSON_FILE]
    assert json.loads((tmp_path / JSON_FILE).read_text())["keys_amax"]
