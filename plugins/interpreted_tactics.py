"""The plans of a node that are interpreted.

They are those for a GPU, but that a program for one token has more rows of weights: a GPU wants many programs with a row or two
each, while here a program takes a millisecond however few rows it has. Rows have nothing to do with one another: each is
added up in the same order, and results have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moecompiler.backends.interpreted_node import INTERPRETED_SM
from moecompiler.plugins.launch import Dims, Kernel, Tactic
from moecompiler.plugins.moe.launch import MoETactic
from moecompiler.plugins.quantized.linear_tactic import LinearTactic
from moecompiler.plugins.quantized.moe_compiled import OneTile
from moecompiler.plugins.quantized.moe_launch import QuantizedMoETactic
from moecompiler.plugins.tactics import tactics

_ROWS = 64


def interpreted_tactics(op: str, attributes: Mapping[str, Any], dims: Dims, dtype: str) -> tuple[Tactic, ...]:
    """See ``tactics.tactics``; those that need CUDA C++ are left out."""
    found = tactics(op, attributes, dims, dtype, INTERPRETED_SM)
    return tuple(_wider(each) for each in found if all(isinstance(kernel, Kernel) for kernel in each.kernels))


def _wider(tactic: Tactic) -> Tactic:
    match tactic:
        case MoETactic() if tactic.one:
            return replace(tactic, one=replace(tactic.one, up_rows=_ROWS, down_rows=_ROWS))
        case QuantizedMoETactic():
            ways = (
                replace(way, up_rows=_ROWS, down_rows=_ROWS) if isinstance(way, OneTile) else way for way in tactic.ways
            )
            return replace(tactic, ways=tuple(ways))
        case LinearTactic() if tactic.one:
            return replace(tactic, one=replace(tactic.one, rows=_ROWS))
    return tactic
