"""A graph's differences as lines of text; what is the same in many layers is written once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from onnx import TensorProto

from moecompiler.debugging.diff import Edit, GraphDiff

_LAYER = re.compile(r"(?P<before>(?:[^.\d][^.]*\.)*)(?P<number>\d+)(?P<after>(?:\..*)?)")
_NAME = re.compile(r"[A-Za-z_][\w./-]*")
_COMPONENT = re.compile(r"(?<=\.)\d+(?=[./]|$)")  # of a module's name: the first is a layer's number
_TYPES = frozenset(name.lower() for name, _ in TensorProto.DataType.items())
_COUNTED = re.compile(r"(?<![.<+\d-])\d+")  # what exporters add to tell names apart


def diff_text(diff: GraphDiff) -> str:
    """Nodes by HF module, then how many of each op, inputs and outputs, weights, functions, versions."""
    lines = []
    for module, edits in _grouped(diff):
        lines.append(f"{module or '(no module)'}: {_counts(edits)}")
        lines += _lines(edits)
    before, after = diff.nodes
    lines.append(f"nodes: {before} -> {after} ({after - before:+})" if diff.modules else f"nodes: {after}, the same")
    lines += _ops(diff)
    for name, edits in diff.sections.items():
        lines.append(f"{name}: {_counts(edits) if edits else 'the same'}")
        lines += [line for alike in _alike_edits(edits) for line in alike]
    lines += [f"note: {note}" for note in diff.notes]
    return "\n".join(lines) + "\n"


def _grouped(diff: GraphDiff) -> Iterator[tuple[str, Sequence[Edit]]]:
    """Modules with their edits, in order; those of layers whose edits are the same but for numbers in names are one, which
    is called ``model.layers.0..3.mlp`` and shows the first's."""
    groups: dict[object, list[str]] = {}
    for module, edits in diff.modules.items():
        layer = _LAYER.fullmatch(module)
        key = (layer["before"], layer["after"], _canonical(edits, layer)) if layer else module
        groups.setdefault(key, []).append(module)
    for modules in groups.values():
        yield _joined(modules), diff.modules[modules[0]]


def _joined(modules: Sequence[str]) -> str:
    layers = [_LAYER.fullmatch(module) for module in modules]
    first = layers[0]
    if first is None or len(modules) == 1:
        return modules[0]
    return f"{first['before']}{ranges([int(layer['number']) for layer in layers if layer])}{first['after']}"


def ranges(numbers: Sequence[int]) -> str:
    """``0..3,5`` of 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


def _canonical(edits: Sequence[Edit], layer: re.Match[str] | None) -> tuple[tuple[str | None, str | None], ...]:
    """The edits as they read in every layer: a layer's number as its distance from ``layer``, other numbers at the end of names
    by when the name first comes, and the layer's own name left off where it begins the names of tensors (those of the one layer
    that was exported begin with nothing). Numbers that tell experts apart stay."""
    own = f"{layer['before']}{layer['number']}/" if layer else ""
    here = int(layer["number"]) if layer else 0
    seen: dict[str, dict[str, int]] = {}

    def renamed(found: re.Match[str]) -> str:
        if found[0] in _TYPES or found.string[found.end() :][:1] in ("(", "<"):  # a type, or an op
            return found[0]
        name = found[0].removeprefix(own)
        kind = _COUNTED.sub("#", _COMPONENT.sub(lambda number: f"<{int(number[0]) - here:+}>", name, count=1))
        known = seen.setdefault(kind, {})
        return f"{kind}:{known.setdefault(found[0], len(known))}"

    def line(text: str | None) -> str | None:
        return None if text is None else _NAME.sub(renamed, text)

    return tuple((line(each.before), line(each.after)) for each in edits)


def _lines(edits: Sequence[Edit]) -> list[str]:
    return [
        f"  {sign} {line}"
        for each in edits
        for sign, line in zip("-+", (each.before, each.after), strict=True)
        if line is not None
    ]


def _alike_edits(edits: Sequence[Edit]) -> list[list[str]]:
    """The edits' lines; of those that are the same in several layers, the first and how many there are."""
    groups: dict[object, list[Edit]] = {}
    for each in edits:
        layer = _LAYER.match((each.before or each.after or "").partition(" ")[0])
        groups.setdefault(_canonical((each,), layer), []).append(each)
    result = []
    for alike in groups.values():
        lines = _lines(alike[:1])
        if len(alike) > 1:
            lines[-1] += f"  (and {len(alike) - 1} alike)"
        result.append(lines)
    return result


def _counts(edits: Sequence[Edit]) -> str:
    kinds = [each.kind for each in edits]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("removed", "added", "changed") if kind in kinds)


def _ops(diff: GraphDiff) -> list[str]:
    changed = {op: counts for op, counts in diff.ops.items() if counts[0] != counts[1]}
    width = max((len(op) for op in changed), default=0)
    lines = [f"  {op:<{width}} {a:>6} -> {b:<6} {b - a:+}" for op, (a, b) in changed.items()]
    same = [f"{op} {counts[0]}" for op, counts in diff.ops.items() if op not in changed]
    return lines + ([f"  as many as before: {', '.join(same)}"] if same else [])
