"""A file that holds one op of ours and its body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from moecompiler.graph import DOMAIN, IR_VERSION, OPSET
from moecompiler.ops import OpSpec, add_function

_TYPES = {
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float32": TensorProto.FLOAT,
}


def op_model(
    spec: OpSpec,
    attributes: dict[str, Any],
    floats: int = TensorProto.FLOAT,
    leading: Sequence[str] = ("batch", "sequence"),
) -> onnx.ModelProto:
    """A checked model of one node of ``spec``, with symbolic dims as the op declares them; ``leading`` stands for ``...``."""

    def info(value: Any) -> onnx.ValueInfoProto:
        dims = [int(dim) if dim.isdigit() else dim for dim in value.dims]
        dims = [*leading, *dims[1:]] if dims and dims[0] == "..." else dims
        return helper.make_tensor_value_info(value.name, _TYPES.get(value.type, floats), dims)

    node = helper.make_node(
        spec.name, [v.name for v in spec.inputs], [v.name for v in spec.outputs], domain=DOMAIN, **attributes
    )
    graph = helper.make_graph([node], spec.name, [info(v) for v in spec.inputs], [info(v) for v in spec.outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    add_function(model, spec)
    onnx.checker.check_model(model, full_check=True)
    return model


def run_op(spec: OpSpec, attributes: dict[str, Any], *inputs: Any) -> list[np.ndarray]:
    """Runs the op's body in ONNX Runtime on torch tensors or arrays, float32 or float16."""
    arrays = [np.asarray(value) for value in inputs]
    floats = TensorProto.FLOAT16 if arrays[0].dtype == np.float16 else TensorProto.FLOAT
    session = onnxruntime.InferenceSession(op_model(spec, attributes, floats).SerializeToString())
    return session.run(None, dict(zip((v.name for v in spec.inputs), arrays, strict=True)))
