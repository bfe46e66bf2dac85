"""A layered drawing of a directed acyclic graph of boxes, from top to bottom.

After Sugiyama, Tagawa and Toda, "Methods for visual understanding of hierarchical system structures" (1981): layers by longest
path, a point wherever an edge passes through a layer, few crossings by barycenters, and places within layers by least squares.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

GAP = 18.0  # between neighbours in a layer
LAYER_GAP = 24.0
PORT_GAP = 14.0  # between the ends of edges that lead to one box
_ORDERING_SWEEPS = 12
_PLACING_SWEEPS = 60
# how much a bend costs between a box and a box, a box and a point, two points: what is long should be straight
_STIFFNESS = (1.0, 2.0, 8.0)

Point = tuple[float, float]
Edge = tuple[int, int]


@dataclass(frozen=True)
class Placed:
    """Centres of the boxes; for each edge the points it runs through, in which a step down by more than it goes aside is
    straight; the size of the whole."""

    centres: tuple[Point, ...]
    routes: tuple[tuple[Point, ...], ...]
    width: float
    height: float


def layered(sizes: Sequence[Point], edges: Sequence[Edge]) -> Placed:
    """Places boxes of ``sizes`` (width, height) so that none overlap and every edge, by indices of boxes, runs downwards.

    Raises: networkx.NetworkXUnfeasible where the edges have a cycle.
    """
    layers = _layers(len(sizes), edges)
    rows: list[list[int]] = [[] for _ in range(max(layers, default=-1) + 1)]
    for box, layer in enumerate(layers):
        rows[layer].append(box)
    chains, count = [], len(sizes)
    for start, end in edges:
        passed = range(layers[start] + 1, layers[end])
        points = list(range(count, count + len(passed)))
        count += len(points)
        for layer, point in zip(passed, points, strict=True):
            rows[layer].append(point)
        chains.append([start, *points, end])
    segments = [pair for chain in chains for pair in pairwise(chain)]
    rows = _with_few_crossings(rows, segments)
    widths = [width for width, _ in sizes] + [0.0] * (count - len(sizes))
    x = _columns(rows, segments, widths, len(sizes))
    _straighten([chain[1:-1] for chain in chains], rows, x, widths)
    heights = [max((sizes[name][1] for name in row if name < len(sizes)), default=0.0) for row in rows]
    bands, y = [], 0.0
    for height in heights:
        bands.append((y, y + height))
        y += height + LAYER_GAP
    level = {name: bands[index] for index, row in enumerate(rows) for name in row}
    centres = tuple((x[box], sum(level[box]) / 2) for box in range(len(sizes)))
    ports = _ports(chains, x, sizes)
    routes = tuple(_route(chain, x, port, level, sizes) for chain, port in zip(chains, ports, strict=True))
    return Placed(centres, routes, max((a + w / 2 for a, w in zip(x, widths, strict=True)), default=0.0), y - LAYER_GAP)


def _layers(count: int, edges: Sequence[Edge]) -> list[int]:
    """Each box as high as what it depends on allows, then as low as what depends on it allows where no more edges get longer
    than shorter."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(edges)
    generations = list(nx.topological_generations(graph))
    layers = [0] * count
    for layer, boxes in enumerate(generations):
        for box in boxes:
            layers[box] = layer
    for box in (box for boxes in reversed(generations) for box in boxes):
        if 0 < graph.out_degree(box) >= graph.in_degree(box):
            layers[box] = min(layers[each] for each in graph.successors(box)) - 1
    return layers


def _with_few_crossings(rows: list[list[int]], segments: Sequence[Edge]) -> list[list[int]]:
    """The rows in the best of the orders that sweeps of barycenters, down and up, come by."""
    above, below = _neighbours(segments)
    best, fewest = rows, _crossings(rows, below)
    for sweep in range(_ORDERING_SWEEPS):
        rows = [list(row) for row in rows]
        near = above if sweep % 2 == 0 else below
        order = range(1, len(rows)) if sweep % 2 == 0 else range(len(rows) - 2, -1, -1)
        for index in order:
            fixed = {name: place for place, name in enumerate(rows[index - 1 if sweep % 2 == 0 else index + 1])}
            wanted = {name: _mean([fixed[each] for each in near.get(name, ())]) for name in rows[index]}
            # what nothing draws anywhere stays where it is among the others
            known = sorted((name for name in rows[index] if wanted[name] is not None), key=lambda n: wanted[n] or 0.0)
            free = iter(known)
            rows[index] = [name if wanted[name] is None else next(free) for name in rows[index]]
        if (crossings := _crossings(rows, below)) < fewest:
            best, fewest = rows, crossings
    return best


def _neighbours(segments: Sequence[Edge]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for upper, lower in segments:
        above.setdefault(lower, []).append(upper)
        below.setdefault(upper, []).append(lower)
    return above, below


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _crossings(rows: Sequence[Sequence[int]], below: dict[int, list[int]]) -> int:
    total = 0
    for upper, lower in pairwise(rows):
        place = {name: index for index, name in enumerate(lower)}
        seen: list[int] = []
        for name in upper:
            ends = sorted(place[each] for each in below.get(name, ()))
            total += sum(len(seen) - bisect(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return total


def _columns(
    rows: Sequence[Sequence[int]], segments: Sequence[Edge], widths: Sequence[float], boxes: int
) -> list[float]:
    """Centres from left to right, from 0: as near below each other as the order and the widths allow."""
    pulls: dict[int, list[tuple[int, float]]] = {}
    for upper, lower in segments:
        stiffness = _STIFFNESS[(upper >= boxes) + (lower >= boxes)]
        pulls.setdefault(upper, []).append((lower, stiffness))
        pulls.setdefault(lower, []).append((upper, stiffness))
    x = [0.0] * len(widths)
    for row in rows:
        for left, right in pairwise(row):
            x[right] = x[left] + (widths[left] + widths[right]) / 2 + GAP
    for sweep in range(_PLACING_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted, weights = [], []
            for name in row:
                weight = sum(stiffness for _, stiffness in pulls.get(name, ()))
                pulled = sum(x[other] * stiffness for other, stiffness in pulls.get(name, ()))
                wanted.append(pulled / weight if weight else x[name])
                weights.append(weight or 1e-3)
            gaps = [(widths[left] + widths[right]) / 2 + GAP for left, right in pairwise(row)]
            for name, place in zip(row, _apart(wanted, weights, gaps), strict=True):
                x[name] = place
    start = min((a - width / 2 for a, width in zip(x, widths, strict=True)), default=0.0)
    return [a - start for a in x]


def _apart(wanted: Sequence[float], weights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """The places nearest to those wanted, in weighted squares, of which neighbours are at least ``gaps`` apart: isotonic
    regression, by pooling adjacent violators, of what is wanted beyond the gaps."""
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for want, weight, offset in zip(wanted, weights, offsets, strict=False):
        mean, total, count = want - offset, weight, 1
        while pools and pools[-1][0] > mean:
            other, more, size = pools.pop()
            mean, total, count = (mean * total + other * more) / (total + more), total + more, count + size
        pools.append((mean, total, count))
    flat = [mean for mean, _, count in pools for _ in range(count)]
    return [place + offset for place, offset in zip(flat, offsets, strict=False)]


def _straighten(
    long: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], x: list[float], widths: Sequence[float]
) -> None:
    """Puts an edge's points in one line wherever their neighbours leave one free, the longest edges first: least squares spread
    a step aside over all of an edge."""
    beside = {}
    for row in rows:
        for index, name in enumerate(row):
            beside[name] = (row[index - 1] if index else None, row[index + 1] if index + 1 < len(row) else None)
    for points in sorted(long, key=len, reverse=True):
        low, high = 0.0, float("inf")
        for left, right in (beside[point] for point in points):
            low = low if left is None else max(low, x[left] + widths[left] / 2 + GAP)
            high = high if right is None else min(high, x[right] - widths[right] / 2 - GAP)
        if points and low <= high:
            middle = sum(x[point] for point in points) / len(points)
            for point in points:
                x[point] = min(max(middle, low), high)


def _ports(chains: Sequence[Sequence[int]], x: Sequence[float], sizes: Sequence[Point]) -> list[float]:
    """Where each edge ends at the top of its box: side by side, in the order in which they come."""
    ports = [0.0] * len(chains)
    ending: dict[int, list[int]] = {}
    for index, chain in enumerate(chains):
        ending.setdefault(chain[-1], []).append(index)
    for box, edges in ending.items():
        edges.sort(key=lambda index: x[chains[index][-2]])
        gap = min(PORT_GAP, sizes[box][0] * 0.8 / len(edges))
        for place, index in enumerate(edges):
            ports[index] = x[box] + (place - (len(edges) - 1) / 2) * gap
    return ports


def _route(
    chain: Sequence[int], x: Sequence[float], port: float, level: dict[int, Point], sizes: Sequence[Point]
) -> tuple[Point, ...]:
    """From the bottom of the first box to the top of the last, through each layer between them straight down."""
    start, *points, end = chain
    route = [(x[start], sum(level[start]) / 2 + sizes[start][1] / 2), (x[start], level[start][1])]
    for point in points:
        route += [(x[point], level[point][0]), (x[point], level[point][1])]
    return (*route, (port, level[end][0]), (port, sum(level[end]) / 2 - sizes[end][1] / 2))
