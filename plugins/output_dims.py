"""The dims of an op's outputs, from those of its inputs and the names that its spec gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from moecompiler.ops import OpSpec, Value

ANY = "..."
"""As a value's first dim: any number of them."""

Dim = TypeVar("Dim")


def output_dims(spec: OpSpec, output: Value, inputs: Sequence[Sequence[Dim]]) -> list[Dim]:
    """Those of the input that has all of them, and the same type; where there is none, each dim is that of the first input which
    has one of this name. (An output that is written in place of an input must have its very dims.)

    Raises: ValueError where no input has a dim of the output: such an op needs a rule of its own.
    """
    for value, dims in zip(spec.inputs, inputs, strict=True):
        if (value.dims, value.type) == (output.dims, output.type):
            return list(dims)
    known: dict[str, Sequence[Dim]] = {}
    for value, dims in zip(spec.inputs, inputs, strict=True):
        for name, found in _named(value, dims).items():
            known.setdefault(name, found)
    missing = [name for name in output.dims if name not in known]
    if missing:
        raise ValueError(f"{spec.name}: no input has the dim {missing[0]} of output {output.name}")
    return [dim for name in output.dims for dim in known[name]]


def _named(value: Value, dims: Sequence[Dim]) -> dict[str, Sequence[Dim]]:
    names = value.dims
    if names and names[0] == ANY:
        several = len(dims) - len(names) + 1
        return {ANY: dims[:several]} | {name: [dim] for name, dim in zip(names[1:], dims[several:], strict=True)}
    return {name: [dim] for name, dim in zip(names, dims, strict=True)}
