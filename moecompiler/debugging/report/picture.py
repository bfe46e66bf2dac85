"""A fragment of a graph as shapes with places: what the template writes as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import wrap

from moecompiler.debugging.report.fragment import Fragment, Mark, Node, Tensor
from moecompiler.debugging.report.layout import Point, layered
from moecompiler.graph import module_of
from moecompiler.pages.figures import counted

LINE = 15.0  # height of a line of text, in pixels at full size
_MARGIN = 8.0
_PADDING = 8.0
_CHARACTER, _TITLE_CHARACTER = 6.7, 8.0  # widths, in a monospaced font of 11 and 13 pixels
_LONGEST = 44  # characters of a line; what is longer loses its middle, and a tooltip has it whole
_MOST_CONSTANTS = 6  # that are written into a box
SIGNS = {Mark.removed: "− ", Mark.added: "+ ", Mark.changed: "~ ", Mark.context: ""}


@dataclass(frozen=True)
class Line:
    """A line of text, its baseline relative to the top of its box; ``style`` is a CSS class."""

    text: str
    style: str
    y: float


@dataclass(frozen=True)
class Box:
    """An op or a tensor; ``outline`` is an SVG path around (0, 0). ``whole`` is all that can be said of it."""

    x: float
    y: float
    width: float
    height: float
    style: str
    outline: str
    lines: tuple[Line, ...]
    whole: str


@dataclass(frozen=True)
class Wire:
    """An edge as an SVG path with its arrowhead; ``slot`` is which of several inputs it is, written at ``end``."""

    path: str
    head: str
    slot: str
    end: Point
    style: str


@dataclass(frozen=True)
class Picture:
    """``summary`` is what the picture shows in words."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    wires: tuple[Wire, ...]
    summary: str


def draw(fragment: Fragment) -> Picture:
    """Ops and the tensors between them, from inputs at the top to outputs at the bottom."""
    names = list(fragment.tensors)
    box_of = {name: len(fragment.nodes) + index for index, name in enumerate(names)}
    texts = [_node_lines(node) for node in fragment.nodes] + [_tensor_lines(fragment.tensors[name]) for name in names]
    sizes = [_size(lines) for lines in texts]
    edges: list[tuple[int, int]] = []
    slots: list[tuple[int, str]] = []
    styles: list[Mark] = []
    for index, node in enumerate(fragment.nodes):
        for name in node.outputs:
            edges.append((index, box_of[name]))
        several = len(node.inputs) > 1
        for slot, name in node.inputs:
            edges.append((box_of[name], index))
            slots.append((len(edges) - 1, str(slot) if several else ""))
        styles += [node.mark] * (len(edges) - len(styles))
    placed = layered(sizes, edges)
    slot_of = dict(slots)
    wires = tuple(
        _wire(route, slot_of.get(index, ""), styles[index], into_op=index in slot_of)
        for index, route in enumerate(placed.routes)
    )
    ops = zip(fragment.nodes, texts, sizes, placed.centres, strict=False)
    count = len(fragment.nodes)
    tensors = zip(fragment.tensors.values(), texts[count:], sizes[count:], placed.centres[count:], strict=True)
    boxes = [
        _box(lines, size, at, f"op {node.mark}", _outline(size, node.mark), _whole(node))
        for node, lines, size, at in ops
    ]
    boxes += [
        _box(lines, size, at, f"tensor {tensor.role}", _rounded(size, size[1] / 2), f"{tensor.name} {tensor.type}")
        for tensor, lines, size, at in tensors
    ]
    width, height = placed.width + 2 * _MARGIN, placed.height + 2 * _MARGIN
    return Picture(round(width, 1), round(max(height, 0.0), 1), tuple(boxes), wires, _summary(fragment))


def _node_lines(node: Node) -> tuple[tuple[str, str], ...]:
    """Text and style of each line."""
    module, name = module_of(node.name), node.name.rpartition("/")[2]
    # a weight is mostly one of the module's own
    texts = [text.replace(f" {module}.", " .") if module else text for text in node.constants]
    constants = [(text, "constant") for text in texts[:_MOST_CONSTANTS]]
    if len(node.constants) > _MOST_CONSTANTS:
        constants.append((f"and {len(node.constants) - _MOST_CONSTANTS} more constants", "constant"))
    attributes = [(text, "attributes") for text in wrap(node.attributes, _LONGEST, max_lines=3, placeholder=" …")]
    origin = [(name, "name"), (module, "module")] if module else [(name, "name")]
    return ((f"{SIGNS[node.mark]}{node.op}", "title"), *origin, *attributes, *constants)


def _tensor_lines(tensor: Tensor) -> tuple[tuple[str, str], ...]:
    what = f"{tensor.role} {tensor.name}" if tensor.role else tensor.name
    more = [(counted(tensor.unseen, "more reader"), "module")] if tensor.unseen else []
    return ((what, "name"), *([(tensor.type, "type")] if tensor.type else []), *more)


def _shortened(text: str) -> str:
    """Without its middle, where it is too long: the end of a name says more than what comes before."""
    if len(text) <= _LONGEST:
        return text
    half = (_LONGEST - 1) // 2
    return f"{text[: _LONGEST - 1 - half]}…{text[-half:]}"


def _size(lines: Sequence[tuple[str, str]]) -> Point:
    widths = [len(_shortened(text)) * (_TITLE_CHARACTER if style == "title" else _CHARACTER) for text, style in lines]
    return max(widths) + 2 * _PADDING + 6, len(lines) * LINE + _PADDING


def _box(lines: Sequence[tuple[str, str]], size: Point, centre: Point, style: str, outline: str, whole: str) -> Box:
    width, height = size
    written = tuple(
        Line(_shortened(text), kind, round(_PADDING / 2 + LINE * (index + 0.76), 1))
        for index, (text, kind) in enumerate(lines)
    )
    x, y = centre[0] - width / 2 + _MARGIN, centre[1] - height / 2 + _MARGIN
    return Box(round(x, 1), round(y, 1), round(width, 1), round(height, 1), style.strip(), outline, written, whole)


def _outline(size: Point, mark: Mark) -> str:
    """What went has its corners cut off, what came has them round, what changed is pointed, what stays is a rectangle."""
    w, h = (round(each, 1) for each in size)
    if mark == Mark.removed:
        return f"M7 0H{w - 7}L{w} 7V{h - 7}L{w - 7} {h}H7L0 {h - 7}V7Z"
    if mark == Mark.added:
        return _rounded(size, 11)
    if mark == Mark.changed:
        return f"M8 0H{w - 8}L{w} {h / 2}L{w - 8} {h}H8L0 {h / 2}Z"
    return f"M0 0H{w}V{h}H0Z"


def _rounded(size: Point, radius: float) -> str:
    w, h = (round(each, 1) for each in size)
    r = round(min(radius, h / 2), 1)
    arc = f"A{r} {r} 0 0 1"
    return f"M{r} 0H{w - r}{arc} {w} {r}V{h - r}{arc} {w - r} {h}H{r}{arc} 0 {h - r}V{r}{arc} {r} 0Z"


def _wire(route: Sequence[Point], slot: str, style: str, into_op: bool) -> Wire:
    """Straight down through layers, curved between them; an arrowhead where it enters an op."""
    points = [(round(x + _MARGIN, 1), round(y + _MARGIN, 1)) for x, y in route]
    path = f"M{points[0][0]} {points[0][1]}"
    for index, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        if index % 2 == 0 or x0 == x1:
            path += f"V{y1}"
        else:
            middle = round((y0 + y1) / 2, 1)
            path += f"C{x0} {middle} {x1} {middle} {x1} {y1}"
    x, y = points[-1]
    head = f"M{x} {y}l-3.5 -7h7Z" if into_op else ""
    return Wire(path, head, slot, (x + 3, y - 8), style)


def _whole(node: Node) -> str:
    inputs = ", ".join([*(f"{slot}: {name}" for slot, name in node.inputs), *node.constants])
    said = f"{node.name}: {', '.join(node.outputs)} = {node.op}({inputs})"
    return f"{said} {node.attributes}".strip()


def _summary(fragment: Fragment) -> str:
    """``3 removed, 1 changed, 2 for context``."""
    counts = {mark: sum(node.mark == mark for node in fragment.nodes) for mark in Mark}
    words = {Mark.removed: "removed", Mark.added: "added", Mark.changed: "changed", Mark.context: "around them"}
    said = [f"{count} {words[mark]}" for mark, count in counts.items() if count]
    return f"{counted(len(fragment.nodes), 'node')}: {', '.join(said)}" if said else "no nodes"
