"""Graphs after passes, as files that run: one ONNX file each, their weights in one safetensors file that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

from moecompiler.graph import Program, weight_tensor
from moecompiler.packing import pack, tensors_of
from moecompiler.safetensors_file import layout
from moecompiler.weights import Recipe, TensorReader

WEIGHTS = "weights.safetensors"


def write_dumps(
    programs: Mapping[str, Program],
    reader: TensorReader | None,
    path_of: Callable[[str], Path],
    progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Writes each program, by the name of its file, and, with a reader, each distinct weight of them all once, one at a time.

    ``path_of``: file name → where to write it.
    """
    recipes, stored = distinct_weights(programs)
    _, offsets, _ = layout(tensors_of(recipes))
    for file, program in programs.items():
        model = onnx.ModelProto()
        model.CopyFrom(program.model)
        for index, tensor in enumerate(model.graph.initializer):
            if recipe := program.weights.get(tensor.name):
                pointer = weight_tensor(tensor.name, recipe, WEIGHTS, offsets[stored[tensor.name, recipe]])
                model.graph.initializer[index].CopyFrom(pointer)
        path_of(file).write_bytes(model.SerializeToString(deterministic=True))
    if reader is not None:
        pack([(path_of(WEIGHTS), recipes)], reader, progress)


def distinct_weights(
    programs: Mapping[str, Program],
) -> tuple[dict[str, Recipe], dict[tuple[str, Recipe], str]]:
    """Every distinct weight under a name of its own, and that name for each weight of a program."""
    recipes: dict[str, Recipe] = {}
    stored: dict[tuple[str, Recipe], str] = {}
    for program in programs.values():
        for name, recipe in sorted(program.weights.items()):
            if (name, recipe) not in stored:
                free = name if name not in recipes else f"{name}@{len(recipes)}"
                recipes[free] = recipe
                stored[name, recipe] = free
    return recipes, stored
