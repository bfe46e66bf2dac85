"""ONNX files that somebody else wrote: checked, and turned into programs whose weights are taken by reference."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnx.external_data_helper import load_external_data_for_tensor

from moecompiler.errors import UserError
from moecompiler.graph import (
    IR_VERSION,
    ONNX_DTYPES,
    OPSET,
    SCOPES,
    Program,
    name_in_scopes,
    node_name,
    weight_tensor,
)
from moecompiler.shape_inference import infer_symbolic_shapes
from moecompiler.weights import FLOATS, NUMPY_DTYPES, Shape, whole

_OLDEST_OPSET = 18  # torch's default; what came since then is converted node by node
_TRACED_NAME = re.compile(r"/(.+)/[^/]+")
_OUR_NAME = re.compile(r"[^/]*/[^/]+")
_MOST_HELD = 1 << 30  # bytes of what is no weight; protobuf takes no file of 2 GiB
_SMALLEST_WEIGHT = 1024  # bytes; what is smaller may be read to fold and to match
_NAMES = {ONNX_DTYPES[name]: name for name in (*FLOATS, "int64")}


@dataclass(frozen=True)
class OnnxReader:
    """Reads the initializers of an ONNX file; see ``weights.TensorReader``."""

    directory: Path
    tensors: dict[str, TensorProto]

    @property
    def files(self) -> set[Path]:
        """The files that are read, with links followed."""
        external = (each for each in self.tensors.values() if each.data_location == TensorProto.EXTERNAL)
        return {(self.directory / external_place(each)[0]).resolve() for each in external}

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        """The box of ``shape`` at ``start``; of a tensor in a file of its own, nothing else is read."""
        tensor = self.tensors[name]
        box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)[box]
        location, offset, _ = external_place(tensor)
        dtype = NUMPY_DTYPES[_NAMES[tensor.data_type]]
        return np.memmap(self.directory / location, dtype, "r", offset, tuple(tensor.dims))[box]


def open_foreign(path: Path) -> tuple[Program, OnnxReader]:
    """Reads an ONNX file and names its nodes after the HF modules that torch's exporter notes, if it noted any.

    Raises: UserError, one line, where it is no ONNX file or not of opset 18 to 21, its graph has a cycle or reads what nothing
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
    if not _OLDEST_OPSET <= opset <= OPSET:
        raise UserError(
            f"{path}: is of opset {opset}; export it with opset_version={OPSET} ({_OLDEST_OPSET} and up will do)"
        )
    _check_order(path, model.graph)
    branches = list(_branches(model.graph))
    for graph in (model.graph, *branches):
        _check_external(path, graph.initializer)
    name_after_modules(model.graph.node)
    if opset < OPSET:
        model = _converted(path, model)
    model.ir_version = IR_VERSION
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    branches = list(_branches(model.graph))
    inner = {
        name for branch in branches for node in branch.node for name in node.input
    }  # graphs within hold data alone
    weights = {
        name: whole(name, _NAMES[each.data_type], tuple(each.dims))
        for name, each in tensors.items()
        if _is_weight(each) and name not in inner
    }
    reader = OnnxReader(path.parent, {name: _copy(tensors[name]) for name in weights})
    _load_all_but(weights, path, (model.graph, *branches))
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name in weights:
            model.graph.initializer[index].CopyFrom(weight_tensor(tensor.name, weights[tensor.name]))
    return Program(infer_symbolic_shapes(model), weights), reader


def _branches(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graphs within a graph: branches of ``If``, bodies of ``Loop`` and ``Scan``."""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield inner
                yield from _branches(inner)


def _load_all_but(weights: Container[str], path: Path, graphs: Sequence[onnx.GraphProto]) -> None:
    """Takes into the graphs what lies outside (torch stores the smallest constant there too) and is no weight of the first.

    Raises: UserError where that is more than an ONNX file can hold.
    """
    outside = [
        tensor
        for index, graph in enumerate(graphs)
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL and (index or tensor.name not in weights)
    ]
    size = sum(math.prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in outside)
    if size > _MOST_HELD:
        kinds = ", ".join(sorted({TensorProto.DataType.Name(tensor.data_type).lower() for tensor in outside}))
        raise UserError(
            f"{path}: holds {size} bytes of {kinds} beside its floating-point weights; up to {_MOST_HELD} can be taken along"
        )
    for tensor in outside:
        load_external_data_for_tensor(tensor, str(path.parent))
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def name_after_modules(nodes: Iterable[onnx.NodeProto]) -> None:
    """Gives each node the name ``module/op_number``, the module empty where the exporter said none.

    torch's exporter notes the modules in the node's metadata; the tracing one (``dynamo=False``) in its name, as
    ``/model/layers.0/mlp/Reshape_1``. A file whose nodes all have such names, each its own, is a result of passes and keeps them.
    """
    nodes = list(nodes)
    given = {node.name for node in nodes}
    if len(given) == len(nodes) and all(_OUR_NAME.fullmatch(name) for name in given) and not notes_modules(nodes):
        return
    for index, node in enumerate(nodes):
        noted = next((each.value for each in node.metadata_props if each.key == SCOPES), "")
        name = f"{node.op_type}_{index}"
        traced = _TRACED_NAME.fullmatch(node.name)
        node.name = name_in_scopes(noted, name) if noted or not traced else node_name(traced[1].replace("/", "."), name)
        del node.metadata_props[:]


def notes_modules(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Whether an exporter noted modules, in either way."""
    return any(
        _TRACED_NAME.fullmatch(node.name) or any(each.key == SCOPES for each in node.metadata_props) for node in nodes
    )


def _converted(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at our opset. The converter knows no external data, so initializers wait outside, as inputs do."""
    held = list(model.graph.initializer)
    names = {tensor.name for tensor in held}
    inputs = list(model.graph.input)
    constants = [tensor for tensor in held if tensor.data_location != TensorProto.EXTERNAL and not _is_weight(tensor)]
    outside = [tensor for tensor in held if all(tensor is not each for each in constants)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    model.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in outside)
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, OPSET)
    except Exception as error:  # it raises RuntimeError and its own errors, which share no base class
        first = str(error).strip().splitlines()[:1]
        raise UserError(
            f"{path}: cannot be converted to opset {OPSET}: {''.join(first)}; export it at that opset"
        ) from None
    del converted.graph.input[:]
    converted.graph.input.extend(each for each in inputs if each.name not in names)
    converted.graph.initializer.extend(outside)
    return converted


def _is_weight(tensor: TensorProto) -> bool:
    """Large, of a type that recipes know, and floating: integer tables are read by passes."""
    name = _NAMES.get(tensor.data_type)
    if name is None or name == "int64":
        return False
    return math.prod(tensor.dims) * NUMPY_DTYPES[name].itemsize >= _SMALLEST_WEIGHT


def _copy(tensor: TensorProto) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    return copy


def external_place(tensor: TensorProto) -> tuple[str, int, int | None]:
    """Where the data of an external tensor are: location, offset and length, the last None where the file does not say."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = entries.get("length")
    return entries.get("location", ""), int(entries.get("offset", 0)), None if length is None else int(length)


def _check_external(path: Path, tensors: Iterable[TensorProto]) -> None:
    folder = path.parent.resolve()
    for tensor in tensors:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location, offset, length = external_place(tensor)
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
