"""What attention looks like between its projections: heads, rotary embedding, and tests of what patterns cannot say."""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from moecompiler.passes.pattern import Match, Op, Pattern, Var, producer_of, small_constant


def along_axis(expected: int) -> Callable[[gs.Node], str | None]:
    """A test that a node works along axis ``expected`` (of four, so -1 is 3)."""

    def test(node: gs.Node) -> str | None:
        axis = node.attrs.get("axis", -1 if node.op == "Softmax" else 0)
        rank = len(node.outputs[0].shape or (0, 0, 0, 0))
        same = axis % rank == expected % rank
        return None if same else f"it works along axis {axis}, not {expected}"

    return test


def permutes(*expected: int) -> Callable[[gs.Node], str | None]:
    def test(node: gs.Node) -> str | None:
        perm = list(node.attrs.get("perm", ()))
        return None if perm == list(expected) else f"it permutes axes {perm}, not {list(expected)}"

    return test


def heads(projection: str) -> Op:
    """``[B, S, heads * D]`` → ``[B, heads, S, D]``."""
    return Op("Transpose", (Op("Reshape", (Var(projection),)),), name=f"{projection}_heads", test=permutes(0, 2, 1, 3))


def _half(of: Pattern, which: str) -> Op:
    return Op("Slice", (of,), name=which)


def rotated(projection: str) -> Op:
    """``x * cos + rotate_half(x) * sin``; that both halves are of the same ``x`` is for the check to see."""
    whole = heads(projection)
    turned = Op(
        "Concat",
        (Op("Neg", (_half(whole, f"{projection}_high"),)), _half(whole, f"{projection}_low")),
        test=along_axis(-1),
    )
    straight = Op("Mul", (whole, Var("cos")), commutative=True)
    return Op("Add", (straight, Op("Mul", (turned, Var("sin")), commutative=True)), commutative=True)


def heads_shape(found: Match, projection: str) -> list[int | str]:
    return list(found.named[f"{projection}_heads"].outputs[0].shape)


def halves_differ(found: Match, projection: str) -> str | None:
    size = heads_shape(found, projection)[-1]
    if not isinstance(size, int):
        return f"the head size of the {projection} is not known"
    for which, bounds in (("low", (0, size // 2)), ("high", (size // 2, size))):
        node = found.named[f"{projection}_{which}"]
        values = [small_constant(tensor) for tensor in node.inputs[1:]]
        if any(value is None or value.size != 1 for value in values):
            return f"{node.name} does not slice one axis at constant places"
        start, end, axis = (int(value.item()) for value in values[:3] if value is not None)
        if (start, min(end, size), axis % 4) != (*bounds, 3):
            return f"{node.name} takes [{start}:{end}] of axis {axis}, not [{bounds[0]}:{bounds[1]}] of the last"
        if producer_of(node.inputs[0]) is not found.named[f"{projection}_heads"]:
            return f"{node.name} slices another tensor than what it is added to"
    return None
