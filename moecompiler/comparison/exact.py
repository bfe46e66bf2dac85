"""What an op of ours should compute: its body in float64, by ONNX Runtime.

Every floating-point tensor of the body is float64, whatever its type, and so is every constant. Codes stand for the product of
code and scale itself: that a body rounds it to its own type is an error of the body, and a kernel that scales sums instead does
not make it. Where a body rounds activations to codes, so does this, for that is what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import NodeProto, TensorProto, helper, numpy_helper

from moecompiler.validation.place import Arrays
from moecompiler.weights import Recipe

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_DOUBLE = TensorProto.DOUBLE
_CODES = {TensorProto.INT4: "int4", TensorProto.FLOAT8E4M3FN: "float8_e4m3fn"}
# what ONNX Runtime has no float64 kernels for, or what has no float64 form: computed in float32
_NARROW = ("QuantizeLinear",)


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its functions inlined and every float a float64: it takes and gives float64 where it had another float.
    Without initializers: each is an input."""
    inlined = onnx.inliner.inline_local_functions(all_inputs(model))
    types = _types(inlined)
    nodes = [each for node in inlined.graph.node for each in _wide_nodes(node, types)]
    del inlined.graph.node[:], inlined.graph.value_info[:]
    inlined.graph.node.extend(nodes)
    for value in (*inlined.graph.input, *inlined.graph.output):
        if value.type.tensor_type.elem_type in _FLOATS:
            value.type.tensor_type.elem_type = _DOUBLE
    return inlined


def all_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its initializers as inputs, of any size."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in model.graph.initializer:
        dims = [None] * len(tensor.dims)
        result.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, dims))
    del result.graph.initializer[:]
    return result


class Exact:
    """Runs what ``widened`` makes of a model that holds one node of ours. All nodes of the same op and attributes can share
    it, for weights are inputs of it."""

    def __init__(self, model: onnx.ModelProto):
        import onnxruntime

        wide = widened(model)
        self._inputs = {value.name: value.type.tensor_type.elem_type for value in wide.graph.input}
        self._outputs = [value.name for value in model.graph.output]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(wide.SerializeToString(), options, providers=providers)

    def __call__(self, weights: Mapping[str, np.ndarray], cases: Sequence[Arrays]) -> list[Arrays]:
        """Outputs for the inputs of each case, by the model's names; floats as float64. ``weights`` are the same in all of
        them, but for those that a case has itself; arrays are of any floating-point type, int4 one to a byte.

        A MoE's experts are computed one at a time, so that one is in memory as float64.
        """
        if "expert_ids" not in weights:
            return [self._run(self._values(weights), case) for case in cases]
        sums: list[Arrays] = [{} for _ in cases]
        for part in by_expert(weights):
            values = self._values(part)
            for total, case in zip(sums, cases, strict=True):
                for name, array in self._run(values, case).items():
                    total[name] = total[name] + array if name in total else array
        return sums

    def _run(self, values: Mapping[str, Any], case: Arrays) -> Arrays:
        feeds = {**values, **self._values(case)}
        results = self._session.run_with_ort_values(self._outputs, {name: feeds[name] for name in self._inputs})
        return {name: value.numpy() for name, value in zip(self._outputs, results, strict=True)}

    def _values(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {name: ort_value(array, self._inputs[name]) for name, array in arrays.items()}


def ort_value(array: np.ndarray, kind: int) -> Any:
    """An array as ONNX Runtime takes a tensor of an ONNX type: floats are converted to it, codes are as they are, int4 one to a
    byte."""
    import onnxruntime

    from moecompiler.backends.onnxruntime_program import as_bits

    if kind in (TensorProto.FLOAT, _DOUBLE):
        wide = np.float32 if kind == TensorProto.FLOAT else np.float64
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, wide))
    bits = as_bits(Recipe(_CODES.get(kind, ""), array.shape), np.ascontiguousarray(array))
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)


def by_expert(weights: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """A MoE's weights, by the op's names of its inputs, as those of MoEs of one expert each, whose outputs add up to its own.
    The router is all of theirs; all else belongs to experts, one after another."""
    count = len(weights["expert_ids"])
    for index in range(count):
        yield {
            name: array if name == "router" or len(array) % count else np.split(array, count)[index]
            for name, array in weights.items()
        }


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """The element types of all tensors, where they can be told."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}


def _wide_nodes(node: NodeProto, types: Mapping[str, int]) -> Iterator[NodeProto]:
    """What a node becomes."""
    if node.op_type == "DequantizeLinear":
        yield from _dequantize(node)
        return
    wide = NodeProto()
    wide.CopyFrom(node)
    if node.op_type in _NARROW:
        for index, name in enumerate(node.input):
            if types.get(name) in _FLOATS:
                wide.input[index] = f"{name}/narrow/{node.output[0]}"
                yield helper.make_node("Cast", [name], [wide.input[index]], to=TensorProto.FLOAT)
    for attribute in wide.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _FLOATS:
            attribute.i = _DOUBLE
    if node.op_type in ("Constant", "ConstantOfShape"):
        _widen_constant(wide)
    yield wide


def _dequantize(node: NodeProto) -> Iterator[NodeProto]:
    """The product of code and scale in float32: exact where the scale has 16 bits, for codes have 8 at most."""
    scale, product = (f"{node.output[0]}/{part}" for part in ("scale", "product"))
    inner = NodeProto()
    inner.CopyFrom(node)
    inner.input[1], inner.output[0] = scale, product
    yield helper.make_node("Cast", [node.input[1]], [scale], to=TensorProto.FLOAT)
    yield inner
    yield helper.make_node("Cast", [product], [node.output[0]], to=_DOUBLE)


def _widen_constant(node: NodeProto) -> None:
    kept = []
    for attribute in node.attribute:
        if attribute.name == "value_float":
            array = np.array(attribute.f, np.float64)
        elif attribute.name == "value_floats":
            array = np.array(attribute.floats, np.float64)
        elif attribute.name == "value" and attribute.t.data_type in _FLOATS:
            array = numpy_helper.to_array(attribute.t).astype(np.float64)
        else:
            kept.append(attribute)
            continue
        kept.append(helper.make_attribute("value", numpy_helper.from_array(array)))
    values = [onnx.AttributeProto.FromString(each.SerializeToString()) for each in kept]
    del node.attribute[:]
    node.attribute.extend(values)
