"""ONNX files that somebody else wrote: checked, and turned into programs whose weights are taken by reference."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from moecompiler.errors import UserError
from moecompiler.graph import IR_VERSION, ONNX_DTYPES, OPSET, SCOPES, Program, name_in_scopes, weight_tensor
from moecompiler.weights import NUMPY_DTYPES, Piece, Recipe, Shape

_SMALLEST_WEIGHT = 1024  # bytes; what is smaller may be read to fold and to match
_NAMES = {code: name for name, code in ONNX_DTYPES.items()}


@dataclass(frozen=True)
class OnnxReader:
    """Reads the initializers of an ONNX file; see ``weights.TensorReader``."""

    directory: Path
    tensors: dict[str, TensorProto]

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        """The box of ``shape`` at ``start``; of a tensor in a file of its own, nothing else is read."""
        tensor = self.tensors[name]
        box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)[box]
        location, offset, _ = _external(tensor)
        dtype = NUMPY_DTYPES[_NAMES[tensor.data_type]]
        return np.memmap(self.directory / location, dtype, "r", offset, tuple(tensor.dims))[box]


def open_foreign(path: Path) -> tuple[Program, OnnxReader]:
    """Reads an ONNX file and names its nodes after the HF modules that torch's exporter notes, if it noted any.

    Raises: UserError, one line, where it is no ONNX file or not of opset 21, its graph has a cycle or reads what nothing
    writes, or external data is missing, too short, or outside the file's own folder.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # protobuf's decode errors share no base class
        raise UserError(f"{path}: is not an ONNX file: {error}") from None
    if not model.HasField("graph") or not model.graph.node:
        raise UserError(f"{path}: is not an ONNX file: it holds no graph")
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    if opset != OPSET:
        raise UserError(f"{path}: is of opset {opset}; export it with opset_version={OPSET}")
    _check_order(path, model.graph)
    _check_external(path, model.graph.initializer)
    name_after_modules(model.graph.node)
    model.ir_version = IR_VERSION
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {name: _whole(tensor) for name, tensor in tensors.items() if _is_weight(tensor)}
    reader = OnnxReader(path.parent, {name: _copy(tensors[name]) for name in weights})
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name in weights:
            model.graph.initializer[index].CopyFrom(weight_tensor(tensor.name, weights[tensor.name]))
    return Program(onnx.shape_inference.infer_shapes(model, data_prop=True), weights), reader


def name_after_modules(nodes: Iterable[onnx.NodeProto]) -> None:
    """Gives each node the name ``module/op_number``; a node of which the exporter noted no module keeps its own name behind an
    empty one."""
    for index, node in enumerate(nodes):
        noted = next((each.value for each in node.metadata_props if each.key == SCOPES), "")
        node.name = name_in_scopes(noted, f"{node.op_type}_{index}")
        del node.metadata_props[:]


def _is_weight(tensor: TensorProto) -> bool:
    """Large, of a type that recipes know, and floating: integer tables are read by passes."""
    name = _NAMES.get(tensor.data_type)
    if name is None or name == "int64":
        return False
    return math.prod(tensor.dims) * NUMPY_DTYPES[name].itemsize >= _SMALLEST_WEIGHT


def _whole(tensor: TensorProto) -> Recipe:
    shape = tuple(tensor.dims)
    zeros = (0,) * len(shape)
    piece = Piece(tensor.name, zeros, shape, zeros, tuple(range(len(shape))))
    return Recipe(_NAMES[tensor.data_type], shape, (piece,))


def _copy(tensor: TensorProto) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    return copy


def _external(tensor: TensorProto) -> tuple[str, int, int | None]:
    """Location, offset and length, the last None where the file does not say."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = entries.get("length")
    return entries.get("location", ""), int(entries.get("offset", 0)), None if length is None else int(length)


def _check_external(path: Path, tensors: Iterable[TensorProto]) -> None:
    folder = path.parent.resolve()
    for tensor in tensors:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location, offset, length = _external(tensor)
        where = f"{path}: the data of {tensor.name} is said to be in {location!r}"
        if not location or Path(location).is_absolute() or not (folder / location).resolve().is_relative_to(folder):
            raise UserError(f"{where}, outside the file's own folder: it is not read")
        if not (folder / location).is_file():
            raise UserError(f"{where}, which is missing: copy it beside the ONNX file")
        itemsize = NUMPY_DTYPES[_NAMES[tensor.data_type]].itemsize if tensor.data_type in _NAMES else 0
        needed = offset + (length if length is not None else math.prod(tensor.dims) * itemsize)
        if (folder / location).stat().st_size < needed:
            raise UserError(f"{where}, which ends before it ({needed} bytes are needed): copy it again")


def _check_order(path: Path, graph: onnx.GraphProto) -> None:
    """ONNX wants nodes in topological order; what breaks it is a cycle or a name that nothing writes."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    written = known | {name for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            if name not in written:
                raise UserError(f"{path}: node {node.name or node.op_type} reads {name!r}, which nothing writes")
            if name not in known:
                raise UserError(
                    f"{path}: node {node.name or node.op_type} reads {name!r} before it is written (a cycle?)"
                )
        known |= set(node.output)
