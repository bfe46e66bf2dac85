"""Graphs after passes as files: each runs by itself, over weights that lie once in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from graphs import program, whole
from readers import ArrayReader
from safetensors.numpy import load_file

from moecompiler.dumps import WEIGHTS, write_dumps

W = np.arange(16, dtype=np.float32).reshape(4, 4)
V = -W
GRAPH = 'g (float[n, 4] x) => (float[n, 4] y) { ["a/MatMul_0"] y = MatMul (x, %s) }'
READER = ArrayReader({"w": W, "v": V})


def run(path: Path) -> np.ndarray:
    (y,) = onnxruntime.InferenceSession(path).run(None, {"x": np.eye(4, dtype=np.float32)})
    return np.asarray(y)


def test_each_runs_with_its_own_weights(tmp_path: Path) -> None:
    """One name may be another weight in another graph; the same weight is stored once."""
    dumps = {
        "00-given.onnx": program(GRAPH % "w", {"w": whole("w", 4, 4)}),
        "01-same.onnx": program(GRAPH % "w", {"w": whole("w", 4, 4)}),
        "02-turned.onnx": program(GRAPH % "t", {"t": whole("w", 4, 4).transposed((1, 0))}),
        "03-other.onnx": program(GRAPH % "w", {"w": whole("v", 4, 4)}),
    }
    done: list[float] = []
    write_dumps(dumps, READER, lambda name: tmp_path / name, done.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*dumps, WEIGHTS]
    for name, wanted in zip(dumps, (W, W, W.T, V), strict=True):
        np.testing.assert_array_equal(run(tmp_path / name), wanted)
    assert len(load_file(tmp_path / WEIGHTS)) == 3
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert list(dumps["03-other.onnx"].weights) == ["w"]  # the programs are as they were


def test_without_weights(tmp_path: Path) -> None:
    write_dumps({"00-given.onnx": program(GRAPH % "w", {"w": whole("w", 4, 4)})}, None, lambda name: tmp_path / name)
    (file,) = tmp_path.iterdir()
    (tensor,) = onnx.load(file, load_external_data=False).graph.initializer
    assert tensor.data_location == onnx.TensorProto.EXTERNAL
