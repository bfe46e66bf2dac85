"""Rounding to E4M3 by plain operators: bit for bit what QuantizeLinear and DequantizeLinear make of it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from moecompiler.backends.tensorrt_fp8_rounding import round_by_arithmetic


def pair(scale: float = 1.0, kind: int = TensorProto.FLOAT8E4M3FN, *, codes_are_read: bool = False) -> onnx.ModelProto:
    """``x`` rounded and rounded back."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["codes"], "mlp/MoE_1.Quantize_4", output_dtype=kind),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["y"], "mlp/MoE_1.Dequantize_5"),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])]
    if codes_are_read:
        nodes.append(helper.make_node("Cast", ["codes"], ["numbers"], "mlp/Cast", to=TensorProto.FLOAT))
        outputs.append(helper.make_tensor_value_info("numbers", TensorProto.FLOAT, ["n"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph(nodes, "g", [x], outputs, [numpy_helper.from_array(np.array(scale, np.float32), "scale")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


def test_the_same_bits() -> None:
    """Every number of E4M3, the middles between neighbours and what is next to them, numbers beyond, and a million others."""
    values = np.arange(256, dtype=np.uint8)
    codes = np.unique(values.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    codes = codes[np.isfinite(codes)]
    middles = (codes[1:] + codes[:-1]) / 2
    edges = np.concatenate([codes, middles, np.float32([500, -1e30, np.inf, -np.inf, 2**-10, 1e-30])])
    near = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))])
    rng = np.random.default_rng(0)
    others = rng.standard_normal(1 << 20).astype(np.float32) * np.float32(2) ** rng.integers(-14, 10, 1 << 20)
    x = np.concatenate([near, others.astype(np.float32)])
    model = pair()
    wanted = run(model, x)
    assert round_by_arithmetic(model)
    assert {node.op_type for node in model.graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run(model, x), wanted)


@pytest.mark.parametrize(
    "model",
    [pair(0.5), pair(kind=TensorProto.FLOAT8E5M2), pair(codes_are_read=True)],
    ids=["another scale", "another type", "codes are read too"],
)
def test_others_stay(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert not round_by_arithmetic(model)
    assert model.SerializeToString() == before
