"""Fused ops: each is an ONNX function whose body is the subgraph it stands for.

A node of domain ``moecompiler`` with its function in the file is a plain ONNX program: whatever reads the file inlines the
body. Without the function the node is looked up in the backend's plugin registry. So the body is the op's specification and
a plugin's reference in one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import parser

from moecompiler.graph import DOMAIN, OPSET

VERSION = 1


def plugin_name(op: str) -> str:
    """What an op is called as a plugin: not as ONNX or a backend may call an op of theirs."""
    return f"{op}Plugin"


Dim = int | str


@dataclass(frozen=True)
class Value:
    """An input or output of an op: its dims by name (a dim of the same name is the same size) and its element type, ``T`` for
    the op's own floating-point type, else an ONNX type's name."""

    name: str
    dims: tuple[str, ...]
    type: str = "T"


@dataclass(frozen=True)
class OpSpec:
    """A fused op.

    ``attributes`` names each attribute and its Python type (``list``: of integers). ``body`` is the function's text as
    ``onnx.parser`` reads it, without the signature (``#`` begins a comment); it may refer to attributes as ``@name`` and must not
    depend on sizes. ``weights`` names the inputs that are weights, which a quantized variant takes with scales.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attributes: Mapping[str, type]
    body: str
    weights: tuple[str, ...] = ()

    def function(self) -> onnx.FunctionProto:
        """The op as an ONNX function at opset 21."""
        attributes = f"<{', '.join(self.attributes)}>" if self.attributes else ""
        inputs, outputs = (", ".join(value.name for value in values) for values in (self.inputs, self.outputs))
        body = re.sub(r"#.*", "", self.body)
        own = f', "{DOMAIN}": {VERSION}' if f"{DOMAIN}." in body else ""  # ops of ours that it is made of
        header = f'<opset_import: ["": {OPSET}{own}], domain: "{DOMAIN}">'
        return parser.parse_function(f"{header}\n{self.name} {attributes} ({inputs}) => ({outputs})\n{{{body}}}")

    def node(
        self, name: str, inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor], attributes: Mapping[str, Any]
    ) -> gs.Node:
        """A node of this op. Raises: ValueError where inputs, outputs or attributes are not the op's."""
        if len(inputs) != len(self.inputs) or len(outputs) != len(self.outputs):
            raise ValueError(f"{self.name} takes {len(self.inputs)} inputs and gives {len(self.outputs)} outputs")
        if set(attributes) != set(self.attributes):
            raise ValueError(f"{self.name} has attributes {sorted(self.attributes)}, not {sorted(attributes)}")
        known = all(tensor.shape is not None for tensor in inputs)
        shapes = self.output_shapes([tensor.shape for tensor in inputs]) if known else [None] * len(outputs)
        for output, shape in zip(outputs, shapes, strict=True):
            if output.shape is None:
                output.shape = shape
        return gs.Node(self.name, name, dict(attributes), list(inputs), list(outputs), domain=DOMAIN)

    def output_shapes(self, shapes: Sequence[Sequence[Dim]]) -> list[list[Dim]]:
        """The op's shape rule: the outputs' shapes from the inputs'. Dims are sizes, or names where they are open, as one is that
        no input has.

        Raises: ValueError where an input has another rank, or two dims of one name different sizes.
        """
        sizes: dict[str, list[Dim]] = {}
        for value, shape in zip(self.inputs, shapes, strict=True):
            leading = len(shape) - len(value.dims) + 1 if "..." in value.dims else 1
            if leading < 0 or ("..." not in value.dims and len(shape) != len(value.dims)):
                raise ValueError(f"{self.name}: {value.name} is {list(shape)}, not [{', '.join(value.dims)}]")
            left = list(shape)
            for dim in value.dims:
                taken = [left.pop(0) for _ in range(leading if dim == "..." else 1)]
                self._bind(dim, taken, sizes, value.name)
        return [[each for dim in value.dims for each in sizes.get(dim, [dim])] for value in self.outputs]

    def _bind(self, dim: str, taken: list[Dim], sizes: dict[str, list[Dim]], where: str) -> None:
        bound = sizes.setdefault(dim, [int(dim)] if dim.isdigit() else taken)
        for index, (old, new) in enumerate(zip(bound, taken, strict=False)):
            if isinstance(old, int) and isinstance(new, int) and old != new:
                raise ValueError(f"{self.name}: {dim} of {where} is {new}, elsewhere {old}")
            if isinstance(new, int):
                bound[index] = new  # a size says more than a name


def add_function(model: onnx.ModelProto, spec: OpSpec) -> None:
    """Puts the op's function into the file, once, at the file's opset, and declares its domain."""
    if not any(function.name == spec.name and function.domain == DOMAIN for function in model.functions):
        function = spec.function()
        for imported in (each for each in function.opset_import if each.domain == ""):  # a file may not mix opsets
            imported.version = next((each.version for each in model.opset_import if each.domain == ""), OPSET)
        model.functions.append(function)
    if not any(opset.domain == DOMAIN for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
