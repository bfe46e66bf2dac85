"""Backend ``tensorrt`` where there is neither TensorRT nor a GPU: what it says, and what an engine's record refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moecompiler.atomic import temporary_path
from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.choose import find_backend
from moecompiler.backends.tensorrt import import_tensorrt, kept_timings
from moecompiler.backends.tensorrt_messages import explain
from moecompiler.backends.tensorrt_record import Made, Record, check_fits
from moecompiler.errors import UserError

MADE = Made("10.6.0", 90, "NVIDIA H200", "13.0")
RECORD = Record(MADE, 2, ("experts",), {"model.layers.0.mlp/MoE": "MoE"}, {"present.0.key": "past_key_values.0.key"})
NODES = [
    "model.layers.3.mlp/MatMul_1",
    "model.layers.3.mlp/MatMul_12",
    "model.layers.3.self_attn/Attention",
    "Cast_1",
    "",
]


def test_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    backend = find_backend("tensorrt")
    for ask in (
        backend.version,
        backend.header,
        lambda: backend.notes("float16", BuildSettings(EngineLimits(1, 1, 2, 8))),
    ):
        with pytest.raises(UserError, match=r"^TensorRT is not installed: pip install 'moecompiler\[tensorrt\]'$"):
            ask()


def test_broken_is_told_apart_from_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wheel whose libraries are not there says which."""
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(UserError, match=r"^TensorRT does not load \(libnvinfer.so.10: cannot open"):
        import_tensorrt()


def test_timings_that_another_rank_is_writing_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "rank0.timing").write_bytes(b"whole")
    temporary_path(tmp_path / "rank1.timing").write_bytes(b"ha")
    assert kept_timings(tmp_path) == [b"whole"]


def test_record_round_trip(tmp_path: Path) -> None:
    import json

    path = tmp_path / "rank0.engine.json"
    path.write_text(json.dumps(RECORD.to_json()))
    assert Record.load(path) == RECORD


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"made": {"tensorrt": "10.6.0"}}'])
def test_damaged_records(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rank0.engine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"is not the record of an engine: .*; build the engine anew"):
        Record.load(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Record.load(tmp_path / "other.json")


def test_where_an_engine_runs(tmp_path: Path) -> None:
    """On the compute capability and with the TensorRT it was built for; the driver may differ."""
    check_fits(MADE, Made("10.6.0", 90, "NVIDIA H100", "13.1"), tmp_path)
    with pytest.raises(
        UserError, match=r"built by TensorRT 10.6.0, here is 11.0.0: install tensorrt==10.6.0, or build anew"
    ):
        check_fits(MADE, Made("11.0.0", 90, "NVIDIA H200", "13.0"), tmp_path)
    with pytest.raises(UserError, match=r"built on NVIDIA H200 \(SM 90\), here is NVIDIA A100 \(SM 80\)"):
        check_fits(MADE, Made("10.6.0", 80, "NVIDIA A100", "13.0"), tmp_path)


def test_complaints_name_the_module() -> None:
    """The node is the longest of ours that is named, as a whole word; what TensorRT says of its own sources is left out."""
    said = explain(
        "cannot build the engine",
        [
            "[optimizer.cpp::computeCosts::4048] Error Code 10: Could not find any implementation for node"
            " {ForeignNode[model.layers.3.mlp/MatMul_12...model.layers.3.mlp/Add]}.\n"
        ],
        NODES,
    )
    assert said.startswith(
        "TensorRT cannot build the engine at model.layers.3.mlp/MatMul_12 (module model.layers.3.mlp): Error Code 10: Could not"
    )
    assert "optimizer.cpp" not in said
    assert explain("cannot load", ["Version mismatch"], NODES) == "TensorRT cannot load: Version mismatch"
    assert explain("cannot load", [], NODES) == "TensorRT cannot load: it gives no reason"
    assert explain("cannot run", ["a\nb", "a\nb"], ["Cast_1"]) == "TensorRT cannot run: a b"
    assert "at Cast_1 (module the model itself)" in explain("cannot run", ["in Cast_1 (Cast): no"], NODES)
