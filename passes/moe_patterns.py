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


def axes_are(*expected: int) -> Callable[[gs.Node], str | None]:
    """A test that a node works on these axes, counted from the front or from the back."""

    def test(node: gs.Node) -> str | None:
        shape = (node.outputs if node.op == "Unsqueeze" else node.inputs)[0].shape
        values = small_constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = None if values is None else values.reshape(-1).tolist()
        if shape is not None and axes is not None:
            same = {axis % len(shape) for axis in axes} == {axis % len(shape) for axis in expected}
        else:
            same = axes == list(expected)
        return None if same else f"its axes are {axes}, not {list(expected)}"

    return test


def columns(weight: str, perm: list[int]) -> Pattern:
    """A weight ``[experts, out, in]`` as the right operand of a product: transposed by a node, or stored so."""
    return OneOf(
        (Op("Transpose", (Var(weight),), name=f"{weight}_transpose", test=attribute_is("perm", perm)), Var(weight))
    )


def swiglu(both: Pattern) -> Op:
    """``silu(gate) * up`` of the halves of ``both``; that they are its halves is for ``halves_differ`` to see."""
    gate = OneOf((Op("Slice", (both,), name="gate"), Op("Split", (both,), name="split")))
    up = OneOf((Op("Slice", (both,), name="up"), Op("Split", (both,), name="split", output=1)))
    return Op("Mul", (Op("Mul", (gate, Op("Sigmoid", (gate,))), commutative=True), up), commutative=True)


_INNER = swiglu(Op("MatMul", (Var("x"), columns("gate_up", [0, 2, 1]))))
_RESULTS = Op("MatMul", (_INNER, columns("down", [0, 2, 1])))
_LOCAL = Op("Gather", (Var("shares"), Var("expert_ids")), test=attribute_is("axis", 1, 0))
_BY_EXPERT = Op("Unsqueeze", (Op("Transpose", (_LOCAL,), test=attribute_is("perm", [1, 0])),), test=axes_are(2))

EXPERTS = Op(
    "ReduceSum",
    (Op("Mul", (Through(("Cast",), _RESULTS), _BY_EXPERT), commutative=True),),
    test=lambda node: axes_are(0)(node) or attribute_is("keepdims", 0, 1)(node),
)


def halves_differ(experts: Match) -> str | None:
    """Why gate and up are not the first and the second half of one product, or None."""
    node = experts.named.get("split") or experts.named["gate"]
    shape = node.inputs[0].shape
    if shape is None or not isinstance(shape[-1], int):
        return f"the size of what {node.name} divides is not known"
    size, last = shape[-1], len(shape) - 1
    if "split" in experts.named:
        axis, sizes = node.attrs.get("axis", 0), [output.shape[-1] for output in node.outputs]
        right = axis % len(shape) == last and sizes == [size // 2] * 2
        return None if right else f"{node.name} gives {sizes} along axis {axis} of {size}, not its halves"
    for which, bounds in (("gate", (0, size // 2)), ("up", (size // 2, size))):
        values = [small_constant(tensor) for tensor in experts.named[which].inputs[1:4]]
        if len(values) < 3 or any(value is None or value.size != 1 for value in values):
            return f"{experts.named[which].name} does not slice one axis at constant places"
        start, end, axis = (int(np.asarray(value).item()) for value in values)
        if (start, min(end, size), axis % len(shape)) != (*bounds, last):
            return f"the {which} is [{start}:{end}] of axis {axis}, not [{bounds[0]}:{bounds[1]}] of the last"
    return None
