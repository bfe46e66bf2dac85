"""ONNX's own QuantizeLinear and DequantizeLinear on our tensors: by its reference evaluator and by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from moecompiler.quantization.schemes import Format, Granularity, WeightScheme

DTYPES = {Format.INT4: ml_dtypes.int4, Format.UINT4: ml_dtypes.uint4, Format.E2M1: ml_dtypes.float4_e2m1fn}


def as_onnx(codes: np.ndarray, format_: Format) -> np.ndarray:
    """Codes in the dtype by which ONNX's helpers know them."""
    if format_ is Format.E2M1:
        return codes.view(ml_dtypes.float4_e2m1fn)
    return codes.astype(DTYPES.get(format_, format_.dtype))


def attributes(scheme: WeightScheme, shape: tuple[int, ...]) -> dict[str, int]:
    """Of a node over a weight ``[experts, out, in]`` or ``[out, in]``; rows are blocks of their whole length, for a scale per
    expert and row is none per axis."""
    if scheme.granularity is Granularity.TENSOR:
        return {"axis": 0} if len(shape) > 2 else {}
    return {"axis": -1, "block_size": scheme.block_size or shape[-1]}


def with_block_axis(values: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    return values[..., None] if scheme.granularity is Granularity.CHANNEL else values


def run(op: str, inputs: list[np.ndarray], runtime: bool, **attributes_: Any) -> np.ndarray:
    """One node over constants, in opset 21, or 23 for E2M1."""
    names = [f"input{i}" for i in range(len(inputs))]
    constants = [onnx.numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in zip(names, inputs, strict=True)]
    opset = 23 if any(c.data_type == TensorProto.FLOAT4E2M1 for c in constants) else 21
    element = constants[2 if op == "QuantizeLinear" else 1].data_type
    nodes = [helper.make_node(op, names, ["output"], **attributes_)]
    if runtime and element in (
        TensorProto.INT4,
        TensorProto.UINT4,
        TensorProto.FLOAT8E4M3FN,
    ):  # which numpy has no name for
        nodes[0].output[0] = "packed"
        nodes.append(helper.make_node("Cast", ["packed"], ["output"], to=TensorProto.FLOAT))
        element = TensorProto.FLOAT
    output = helper.make_tensor_value_info("output", element, inputs[0].shape)
    model = helper.make_model(
        helper.make_graph(nodes, op, [], [output], constants),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    if not runtime:
        return ReferenceEvaluator(model).run(None, {})[0]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, {})[0]
