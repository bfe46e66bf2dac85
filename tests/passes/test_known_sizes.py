"""Sizes that shape inference knows are folded where a graph computes them; those it does not know are not."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from graphs import check_pass, program

from moecompiler.passes.constant_folding import ConstantFolding
from moecompiler.passes.known_sizes import known_sizes

SIZES = ", ".join(
    f"int64{dims} {name} = {{{value}}}"
    for dims, name, value in (
        ("", "last", "-1"),
        ("", "first", "0"),
        ("[2]", "both", "2, 1"),
        ("[1]", "one", "1"),
        ("[1]", "three", "3"),
        ("[1]", "zero", "0"),
    )
)
KNOWN = {
    "y = Shape <start = 1> (x)": [4, 6],
    "s = Shape (x) y = Gather (s, last)": 6,
    "s = Shape <start = 1> (x) y = Gather (s, first)": 4,
    "s = Shape (x) y = Gather (s, both)": [6, 4],
    "s = Shape (x) y = Slice (s, one, three)": [4, 6],
    "s = Shape (x) y = Slice (s, one, three, zero)": [4, 6],
}
UNKNOWN = (
    "y = Shape (x)",
    "s = Shape (x) y = Gather (s, first)",
    "s = Shape (x) y = Slice (s, zero, three)",
    "s = Shape (x) t = Neg (s) y = Gather (t, last)",
)


def last_node(body: str) -> gs.Node:
    text = f"g (float[N, 4, 6] x) => (int64[M] y) <{SIZES}> {{ {body} }}"
    return gs.import_onnx(program(text).model).nodes[-1]


@pytest.mark.parametrize("body", KNOWN)
def test_known(body: str) -> None:
    sizes = known_sizes(last_node(body))
    assert sizes is not None
    assert sizes.dtype == np.int64
    assert sizes.tolist() == KNOWN[body]


@pytest.mark.parametrize("body", UNKNOWN)
def test_unknown(body: str) -> None:
    assert known_sizes(last_node(body)) is None


def test_folding_takes_them() -> None:
    before = """g (float[N, 4, 6] x) => (int64[1] y) <int64 last = {-1}, int64[1] axis = {0}>
        { ["s"] s = Shape (x) ["n"] n = Gather (s, last) ["u"] u = Unsqueeze (n, axis) ["y"] y = Neg (u) }"""
    after = """g (float[N, 4, 6] x) => (int64[1] y) <int64[1] u = {6}> { ["y"] y = Neg (u) }"""
    check_pass(ConstantFolding(), program(before), program(after), ["folded Gather: n", "folded Unsqueeze: u"])
