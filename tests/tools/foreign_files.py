"""A small ONNX file as somebody else may have it: a gated layer, its weights inside or outside, and things that passes remove."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 32] x) => (float[n, 16] y)
{
    up_t = Transpose <perm=[1, 0]> (up)
    h = MatMul (x, up_t)
    s = Sigmoid (h)
    a = Mul (h, s)
    b = Identity (a)
    two = Constant <value: tensor = float {2.0}> ()
    four = Mul (two, two)
    c = Mul (b, four)
    y = MatMul (c, down)
}"""


def gated_layer() -> onnx.ModelProto:
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for name, shape in (("up", (64, 32)), ("down", (64, 16))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32) / 8, name))
    return model


def save(model: onnx.ModelProto, path: Path, *, external: bool) -> Path:
    """With ``external``, every tensor lies in ``PATH.data``."""
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


def outputs(path: Path) -> np.ndarray:
    """What ONNX Runtime computes from the file as it is."""
    x = np.random.default_rng(1).standard_normal((3, 32), np.float32)
    (y,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    return np.asarray(y)


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
