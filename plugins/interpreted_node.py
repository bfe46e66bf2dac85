"""A node's call, in the process that interprets: arrays in, arrays out, between them the op's plan on memory as a GPU has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np

from moecompiler.backends.interpreted_node import InterpretedNode
from moecompiler.errors import UserError
from moecompiler.plugins.interpreted import run
from moecompiler.plugins.interpreted_tactics import interpreted_tactics
from moecompiler.plugins.interpreter_numbers import only_within
from moecompiler.plugins.launch import Dims, Tactic
from moecompiler.plugins.library import PluginOp, plugin_ops
from moecompiler.safetensors_file import StoredTensor, read_header
from moecompiler.weights import NUMPY_DTYPES

Place: TypeAlias = tuple[int, int]
"""An address, and bytes from there on."""
_ALIGNMENT = 16  # of what plans promise their kernels to be multiples of it, in bytes
# every byte before it is written: of an output NaN in all floating-point types, of the workspace no number that means anything
_UNWRITTEN, _UNKNOWN = 0xFF, 0x7F


def run_node(text: str, file: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """See ``base.PluginLibrary.interpret``."""
    call = _Call(InterpretedNode.from_json(text))
    weights = {index: _place(file, weight.name) for index, weight in call.node.weights.items()}
    given = iter(arrays)
    held = [None if i in weights else call.held(i, next(given)) for i in range(len(call.op.spec.inputs))]
    dims = tuple(
        call.node.weights[i].shape if each is None else tuple(int(size) for size in each.shape)
        for i, each in enumerate(held)
    )
    outputs = call.outputs(dims, held)
    tactic = call.tactic(dims)
    workspace = _aligned((tactic.workspace(dims) + _ALIGNMENT,), np.dtype(np.uint8))
    workspace.fill(_UNKNOWN)
    inputs = [weights[i] if each is None else _place_of(each) for i, each in enumerate(held)]
    places = [_place_of(each) for each in outputs]
    with only_within([*inputs, *places, _place_of(workspace)]):
        launches = tactic.launches(dims)
        run(tactic, launches, [at for at, _ in inputs], [at for at, _ in places], workspace.ctypes.data)
    return [each.astype(np.float32) for each in outputs]


@dataclass(frozen=True)
class _Call:
    node: InterpretedNode

    @property
    def op(self) -> PluginOp:
        return plugin_ops()[self.node.op]

    def held(self, index: int, array: np.ndarray) -> np.ndarray:
        """An input as kernels read it, in memory of its own: rounded to the node's type, if it is of that."""
        kind = self.op.spec.inputs[index].type
        copy = _aligned(array.shape, NUMPY_DTYPES[self.node.dtype if kind == "T" else kind])
        copy[...] = array
        return copy

    def outputs(self, dims: Dims, held: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Where they are written: an aliased one in place of its input."""
        found: list[np.ndarray] = []
        shapes = self.op.spec.output_shapes(dims)
        for index, (value, shape) in enumerate(zip(self.op.spec.outputs, shapes, strict=True)):
            source = held[self.op.aliases[index]] if index in self.op.aliases else None
            if source is None:
                dtype = NUMPY_DTYPES[self.node.dtype if value.type == "T" else value.type]
                source = _aligned(tuple(int(size) for size in shape), dtype)
                source.view(np.uint8).fill(_UNWRITTEN)
            found.append(source)
        return found

    def tactic(self, dims: Dims) -> Tactic:
        """Raises: UserError where this version has no plan of that name."""
        node = self.node
        found = {each.name: each for each in interpreted_tactics(node.op, node.attributes, dims, node.dtype)}
        if node.tactic not in found:
            raise UserError(
                f"{node.name}: the engine's plugin {node.op} was made by another version of moecompiler"
                f" (tactic {node.tactic}): build it anew"
            )
        return found[node.tactic]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose memory begins at a multiple of 16 bytes."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    room = np.empty(nbytes + _ALIGNMENT, np.uint8)
    first = -room.ctypes.data % _ALIGNMENT
    return room[first : first + nbytes].view(dtype).reshape(shape)


def _place_of(array: np.ndarray) -> Place:
    return int(array.ctypes.data), array.nbytes


@cache
def _place(file: str, name: str) -> Place:
    """Where a weight of an engine's file is in memory. ``file`` also says which file of that name it was: another one is mapped
    anew."""
    mapped, stored = _mapped(file)
    return int(mapped.ctypes.data) + stored[name].offset, stored[name].nbytes


@cache
def _mapped(file: str) -> tuple[np.ndarray, dict[str, StoredTensor]]:
    path = Path(file.rsplit("|", 2)[0])
    return np.memmap(path, np.uint8, mode="r"), read_header(path)
