"""Layered drawings: nothing overlaps, edges run downwards, and what can be drawn without a crossing is."""

from __future__ import annotations

from itertools import combinations, pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompiler.debugging.report.layout import layered

Graph = tuple[list[tuple[float, float]], list[tuple[int, int]]]
SIZES = st.tuples(st.floats(10, 300), st.floats(10, 120))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Boxes and edges from earlier ones to later ones, some of them twice."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=14))
    pairs = list(combinations(range(len(sizes)), 2))
    edges = draw(st.lists(st.sampled_from(pairs), max_size=24)) if pairs else []
    return sizes, edges


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_boxes_are_apart_and_edges_run_down(graph: Graph) -> None:
    sizes, edges = graph
    placed = layered(sizes, edges)
    boxes = [
        (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        for (x, y), (width, height) in zip(placed.centres, sizes, strict=True)
    ]
    for left, top, right, bottom in boxes:
        assert left >= -1e-6
        assert top >= -1e-6
        assert right <= placed.width + 1e-6
        assert bottom <= placed.height + 1e-6
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], "two boxes overlap"
    for (start, end), route in zip(edges, placed.routes, strict=True):
        assert all(above[1] <= below[1] + 1e-6 for above, below in pairwise(route))
        assert route[0] == pytest.approx((placed.centres[start][0], boxes[start][3]))
        assert route[-1][1] == pytest.approx(boxes[end][1])
        assert boxes[end][0] <= route[-1][0] <= boxes[end][2]


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_edges_pass_beside_boxes(graph: Graph) -> None:
    """Where an edge goes straight down, it goes through no box but its own."""
    sizes, edges = graph
    placed = layered(sizes, edges)
    for edge, route in zip(edges, placed.routes, strict=True):
        for (x, top), (_, bottom) in list(pairwise(route))[2:-2:2]:
            for box, ((cx, cy), (width, height)) in enumerate(zip(placed.centres, sizes, strict=True)):
                beside = abs(x - cx) >= width / 2 or cy + height / 2 <= top or bottom <= cy - height / 2
                assert beside or box in edge


def test_a_tree_has_no_crossings() -> None:
    """Given with its leaves in an order that would cross."""
    edges = [(0, 1), (0, 2), (1, 5), (1, 3), (2, 4), (2, 6)]
    placed = layered([(40.0, 20.0)] * 7, edges)
    x = [centre[0] for centre in placed.centres]
    assert (x[1] < x[2]) == (max(x[5], x[3]) < min(x[4], x[6]))
    assert x[0] == pytest.approx((x[1] + x[2]) / 2, abs=1)


def test_a_chain_is_straight() -> None:
    placed = layered([(80.0, 20.0), (30.0, 20.0), (120.0, 40.0)], [(0, 1), (1, 2)])
    assert [x for x, _ in placed.centres] == pytest.approx([60.0] * 3)


def test_a_long_edge_is_one_line_beside_the_others() -> None:
    chain = [(box, box + 1) for box in range(6)]
    placed = layered([(40.0 + 30 * (box % 3), 20.0) for box in range(7)], [*chain, (0, 6)])
    inner = placed.routes[-1][2:-2]
    assert len(inner) == 10
    assert len({x for x, _ in inner}) == 1


def test_a_cycle_is_refused() -> None:
    with pytest.raises(nx.NetworkXUnfeasible):
        layered([(10.0, 10.0)] * 2, [(0, 1), (1, 0)])


def test_nothing() -> None:
    assert layered([], []).centres == ()
