"""What a program becomes before TensorRT-RTX's parser reads it: graph in, graph out, without TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from moecompiler.backends.base import BuildSettings
from moecompiler.backends.tensorrt_attention import adapt_attention, caches_in_place
from moecompiler.backends.tensorrt_collectives import lower_collectives
from moecompiler.backends.tensorrt_program import (
    choose_bound,
    inline_literals,
    make_inputs,
    mark_plugins,
)
from moecompiler.graph import Program
from moecompiler.weights import Recipe


@dataclass(frozen=True)
class Lowered:
    """``program``: what the parser reads, its weights those that are baked in; ``bound``: weights that are engine inputs of the
    same name. ``group``: the ranks of its collectives. ``aliases``: outputs that are written over an input: output → input.
    ``notes``: what was asked for and is not so."""

    program: Program
    bound: Mapping[str, Recipe]
    group: tuple[int, ...]
    aliases: Mapping[str, str]
    notes: tuple[str, ...] = ()


def lower(program: Program, settings: BuildSettings, dtype: str) -> Lowered:
    """Plain operators and the bodies of ours, inlined; ``dtype`` is the graph's floating-point type.

    Raises: UserError where the graph's collectives are of several groups.
    """
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    group = lower_collectives(model, dtype)
    model = mark_plugins(model, {})
    adapt_attention(model)
    bound, notes = choose_bound(model, settings, program.weights)
    baked = inline_literals(model, {name: each for name, each in program.weights.items() if name not in bound})
    make_inputs(model, bound)
    return Lowered(Program(model, baked), bound, group, caches_in_place(model), tuple(notes))
