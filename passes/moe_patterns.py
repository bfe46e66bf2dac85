"""What the experts of a MoE block look like, from their input and every expert's share of it to the sum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.passes.pattern import (
    Match,
    OneOf,
    Op,
    Pattern,
    Through,
    Var,
    small_constant,
)


def attribute_is(name: str, expected: object, default: object = None) -> Callable[[gs.Node], str | None]:
    def test(node: gs.Node) -> str | None:
        value = node.attrs.get(name, default)
        return None if value == expected else f"its {name} is {value}, not {expected}"

    return test


def _axes(*expected: int) -> Callable[[gs.Node], str | None]:
    def test(node: gs.Node) -> str | None:
        values = small_constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = None if values is None else values.reshape(-1).tolist()
        return None if axes == list(expected) else f"its axes are {axes}, not {list(expected)}"

    return test


def columns(weight: str, perm: list[int]) -> Pattern:
    """A weight ``[experts, out, in]`` as the right operand of a product: transposed by a node, or stored so."""
    return OneOf(
        (Op("Transpose", (Var(weight),), name=f"{weight}_transpose", test=attribute_is("perm", perm)), Var(weight))
    )


_BOTH = Op("MatMul", (Var("x"), columns("gate_up", [0, 2, 1])))
_GATE = OneOf((Op("Slice", (_BOTH,), name="gate"), Op("Split", (_BOTH,), name="split")))
_UP = OneOf((Op("Slice", (_BOTH,), name="up"), Op("Split", (_BOTH,), name="split", output=1)))
_SILU = Op("Mul", (_GATE, Op("Sigmoid", (_GATE,))), commutative=True)
_RESULTS = Op("MatMul", (Op("Mul", (_SILU, _UP), commutative=True), columns("down", [0, 2, 1])))
_LOCAL = Op("Gather", (Var("shares"), Var("expert_ids")), test=attribute_is("axis", 1, 0))
_BY_EXPERT = Op("Unsqueeze", (Op("Transpose", (_LOCAL,), test=attribute_is("perm", [1, 0])),), test=_axes(2))

EXPERTS = Op(
    "ReduceSum",
    (Op("Mul", (Through(("Cast",), _RESULTS), _BY_EXPERT), commutative=True),),
    test=lambda node: _axes(0)(node) or attribute_is("keepdims", 0, 1)(node),
)


def halves_differ(experts: Match) -> str | None:
    """Why gate and up are not the first and the second half of one product, or None."""
    if "split" in experts.named:
        return None
    size = experts.named["gate"].inputs[0].shape[-1]
    for which, bounds in (("gate", (0, size // 2)), ("up", (size // 2, size))):
        values = [small_constant(tensor) for tensor in experts.named[which].inputs[1:4]]
        if any(value is None or value.size != 1 for value in values):
            return f"{experts.named[which].name} does not slice one axis at constant places"
        start, end, axis = (int(np.asarray(value).item()) for value in values)
        if (start, min(end, size), axis % 3) != (*bounds, 2):
            return f"the {which} is [{start}:{end}] of axis {axis}, not [{bounds[0]}:{bounds[1]}] of the last"
    return None
