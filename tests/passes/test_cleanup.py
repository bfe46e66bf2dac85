"""``CleanUp``: what it removes, beside what looks like it and must stay."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import check_pass, program, run

from moecompiler.passes.cleanup import CleanUp
from moecompiler.pipeline import Change, apply

# name: (graph, the graph that becomes of it, node and op of what is removed)
REMOVED = {
    "Identity": (
        """g (float[N, 4] x) => (float[N, 4] y) { ["m/a"] a = Identity (x) ["m/y"] y = Neg (a) }""",
        """g (float[N, 4] x) => (float[N, 4] y) { ["m/y"] y = Neg (x) }""",
        ["removed Identity: m/a"],
    ),
    "a chain, read twice": (
        """g (float[4] x) => (float[4] y, float[4] z)
        { ["a"] a = Identity (x) ["b"] b = Identity (a) ["y"] y = Add (a, b) ["z"] z = Neg (b) }""",
        """g (float[4] x) => (float[4] y, float[4] z) { ["y"] y = Add (x, x) ["z"] z = Neg (x) }""",
        ["removed Identity: a", "removed Identity: b"],
    ),
    "Cast to its own type": (
        """g (float[4] x) => (float[4] y) { ["a"] a = Cast <to = 1> (x) ["y"] y = Neg (a) }""",
        """g (float[4] x) => (float[4] y) { ["y"] y = Neg (x) }""",
        ["removed Cast: a"],
    ),
    "Cast of bfloat16 to bfloat16": (
        """g (bfloat16[4] x) => (float[4] y) { ["a"] a = Cast <to = 16> (x) ["y"] y = Cast <to = 1> (a) }""",
        """g (bfloat16[4] x) => (float[4] y) { ["y"] y = Cast <to = 1> (x) }""",
        ["removed Cast: a"],
    ),
    "CastLike its own type": (
        """g (float[4] x, float[2] l) => (float[4] y) { ["a"] a = CastLike (x, l) ["y"] y = Neg (a) }""",
        """g (float[4] x, float[2] l) => (float[4] y) { ["y"] y = Neg (x) }""",
        ["removed CastLike: a"],
    ),
    "Concat of one": (
        """g (float[4] x) => (float[4] y) { ["a"] a = Concat <axis = 0> (x) ["y"] y = Neg (a) }""",
        """g (float[4] x) => (float[4] y) { ["y"] y = Neg (x) }""",
        ["removed Concat: a"],
    ),
    "Slice of everything": (
        """g (float[N, 4] x) => (float[N, 4] y)
        <int64[2] starts = {0, 0}, int64[2] ends = {9223372036854775807, 4}, int64[2] axes = {0, -1}>
        { ["a"] a = Slice (x, starts, ends, axes) ["y"] y = Neg (a) }""",
        """g (float[N, 4] x) => (float[N, 4] y) { ["y"] y = Neg (x) }""",
        ["removed Slice: a"],
    ),
    "Slice without axes": (
        """g (float[3, 4] x) => (float[3, 4] y) <int64[1] starts = {0}, int64[1] ends = {3}>
        { ["a"] a = Slice (x, starts, ends) ["y"] y = Neg (a) }""",
        """g (float[3, 4] x) => (float[3, 4] y) { ["y"] y = Neg (x) }""",
        ["removed Slice: a"],
    ),
    "Reshape to its own shape": (
        """g (float[2, 4] x) => (float[2, 4] y) <int64[2] s = {2, -1}>
        { ["a"] a = Reshape (x, s) ["y"] y = Neg (a) }""",
        """g (float[2, 4] x) => (float[2, 4] y) { ["y"] y = Neg (x) }""",
        ["removed Reshape: a"],
    ),
    "Expand to its own shape": (
        """g (float[2, 4] x) => (float[2, 4] y) <int64[2] s = {1, 4}>
        { ["a"] a = Expand (x, s) ["y"] y = Neg (a) }""",
        """g (float[2, 4] x) => (float[2, 4] y) { ["y"] y = Neg (x) }""",
        ["removed Expand: a"],
    ),
    "Transpose of nothing": (
        """g (float[N, 4] x) => (float[N, 4] y) { ["a"] a = Transpose <perm = [0, 1]> (x) ["y"] y = Neg (a) }""",
        """g (float[N, 4] x) => (float[N, 4] y) { ["y"] y = Neg (x) }""",
        ["removed Transpose: a"],
    ),
    "Unsqueeze of no axis": (
        """g (float[N, 4] x) => (float[N, 4] y) <int64[0] axes = {}>
        { ["a"] a = Unsqueeze (x, axes) ["y"] y = Neg (a) }""",
        """g (float[N, 4] x) => (float[N, 4] y) { ["y"] y = Neg (x) }""",
        ["removed Unsqueeze: a"],
    ),
    "before a custom op": (
        """g (float[4] x) => (float[4] y) { ["a"] a = Identity (x) ["y"] y = moecompiler.AllReduce <group = [0, 1]> (a) }""",
        """g (float[4] x) => (float[4] y) { ["y"] y = moecompiler.AllReduce <group = [0, 1]> (x) }""",
        ["removed Identity: a"],
    ),
}
# what looks like the above and is not
KEPT = {
    "Cast to another type": """g (float[4] x) => (float[4] y)
        { ["a"] a = Cast <to = 10> (x) ["y"] y = Cast <to = 1> (a) }""",
    "Cast between the 16-bit types": """g (bfloat16[4] x) => (float[4] y)
        { ["a"] a = Cast <to = 10> (x) ["y"] y = Cast <to = 1> (a) }""",
    "CastLike another type": """g (float[4] x, int64[2] l) => (int64[4] y)
        { ["a"] a = CastLike (x, l) ["y"] y = Neg (a) }""",
    "Concat of two": """g (float[4] x) => (float[8] y) { ["a"] a = Concat <axis = 0> (x, x) ["y"] y = Neg (a) }""",
    "Slice with step 2": """g (float[4] x) => (float[2] y)
        <int64[1] start = {0}, int64[1] end = {4}, int64[1] axis = {0}, int64[1] step = {2}>
        { ["a"] a = Slice (x, start, end, axis, step) ["y"] y = Neg (a) }""",
    "Slice backwards": """g (float[4] x) => (float[4] y)
        <int64[1] start = {-1}, int64[1] end = {-9223372036854775807}, int64[1] axis = {0}, int64[1] step = {-1}>
        { ["a"] a = Slice (x, start, end, axis, step) ["y"] y = Neg (a) }""",
    "Slice from 1": """g (float[N] x) => (float[M] y) <int64[1] start = {1}, int64[1] end = {9223372036854775807}>
        { ["a"] a = Slice (x, start, end) ["y"] y = Neg (a) }""",
    "Slice of a part": """g (float[4, 4] x) => (float[4, 3] y) <int64[2] starts = {0, 0}, int64[2] ends = {4, 3}>
        { ["a"] a = Slice (x, starts, ends) ["y"] y = Neg (a) }""",
    "Slice to the last but one": """g (float[4] x) => (float[3] y) <int64[1] start = {0}, int64[1] end = {-1}>
        { ["a"] a = Slice (x, start, end) ["y"] y = Neg (a) }""",
    "Slice of an unknown length": """g (float[N] x) => (float[M] y) <int64[1] start = {0}, int64[1] end = {4}>
        { ["a"] a = Slice (x, start, end) ["y"] y = Neg (a) }""",
    "Slice to where data says": """g (float[4] x, int64[1] end) => (float[M] y) <int64[1] start = {0}>
        { ["a"] a = Slice (x, start, end) ["y"] y = Neg (a) }""",
    "Reshape to another shape": """g (float[2, 4] x) => (float[4, 2] y) <int64[2] s = {4, 2}>
        { ["a"] a = Reshape (x, s) ["y"] y = Neg (a) }""",
    "Reshape of an unknown shape": """g (float[N, 4] x) => (float[N, 4] y) <int64[2] s = {-1, 4}>
        { ["a"] a = Reshape (x, s) ["y"] y = Neg (a) }""",
    "Expand to another shape": """g (float[1, 4] x) => (float[2, 4] y) <int64[2] s = {2, 1}>
        { ["a"] a = Expand (x, s) ["y"] y = Neg (a) }""",
    "Transpose of something": """g (float[4, 4] x) => (float[4, 4] y)
        { ["a"] a = Transpose <perm = [1, 0]> (x) ["y"] y = Neg (a) }""",
    "Transpose without perm, which reverses": """g (float[4, 4] x) => (float[4, 4] y)
        { ["a"] a = Transpose (x) ["y"] y = Neg (a) }""",
    "Unsqueeze of an axis": """g (float[4] x) => (float[1, 4] y) <int64[1] axes = {0}>
        { ["a"] a = Unsqueeze (x, axes) ["y"] y = Neg (a) }""",
    "Squeeze without axes": """g (float[1, 4] x) => (float[4] y) { ["a"] a = Squeeze (x) ["y"] y = Neg (a) }""",
    "what writes a graph output": """g (float[4] x) => (float[4] y, float[4] a)
        { ["a"] a = Identity (x) ["y"] y = Neg (a) }""",
    "another domain's Identity": """g (float[4] x) => (float[4] y)
        { ["a"] a = moecompiler.Identity (x) ["y"] y = Neg (a) }""",
}
FEEDS = {
    "x": np.arange(-6, 10, dtype=np.float32),
    "l": np.zeros(2, np.float32),
    "end": np.array([3], np.int64),
}


@pytest.mark.parametrize("name", REMOVED)
def test_removed(name: str) -> None:
    before, after, changed = REMOVED[name]
    check_pass(CleanUp(), program(before), program(after), changed)


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    check_pass(CleanUp(), program(KEPT[name]), program(KEPT[name]), [])


@pytest.mark.parametrize("name", [name for name in REMOVED if "bfloat16" not in name and "custom" not in name])
def test_computes_the_same(name: str) -> None:
    before = program(REMOVED[name][0])
    after, _ = apply(CleanUp(), before)
    feeds = {}
    for value in before.model.graph.input:
        shape = [dim.dim_value or 3 for dim in value.type.tensor_type.shape.dim]
        feeds[value.name] = np.resize(FEEDS[value.name], shape)
    for wanted, got in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_changes_name_their_module() -> None:
    text = (
        """g (float[4] x) => (float[4] y) { ["model.layers.3.mlp/Identity_7"] a = Identity (x) ["/y"] y = Neg (a) }"""
    )
    (change,) = apply(CleanUp(), program(text))[1].changes
    assert change == Change("removed Identity", "model.layers.3.mlp/Identity_7", "model.layers.3.mlp", 1)


def test_read_in_a_branch() -> None:
    """What an inner graph reads of the outer one is followed too."""
    before = program("""
        g (float[4] x, bool c) => (float[4] y)
        { ["a"] a = Identity (x)
          ["y"] y = If (c) <then_branch = t () => (float[4] r) { r = Neg (a) },
                            else_branch = e () => (float[4] s) { s = Abs (a) }> }
    """)
    after, result = apply(CleanUp(), before)
    assert result.matches == 1
    for choice in (True, False):
        feeds = {"x": FEEDS["x"][4:8], "c": np.array(choice)}
        np.testing.assert_array_equal(run(after, feeds)[0], run(before, feeds)[0])
