"""What MoE blocks look like: the experts, and the three ways of routing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.config import NormalizationMode
from moecompiler.passes.pattern import (
    Const,
    Match,
    Miss,
    OneOf,
    Op,
    Pattern,
    Through,
    Var,
    match_tensor,
    small_constant,
)


def _attribute(name: str, expected: object, default: object = None) -> Callable[[gs.Node], str | None]:
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


def _columns(weight: str, perm: list[int]) -> Pattern:
    """A weight ``[experts, out, in]`` as the right operand of a product: transposed by a node, or stored so."""
    return OneOf(
        (Op("Transpose", (Var(weight),), name=f"{weight}_transpose", test=_attribute("perm", perm)), Var(weight))
    )


_BOTH = Op("MatMul", (Var("x"), _columns("gate_up", [0, 2, 1])))
_GATE = OneOf((Op("Slice", (_BOTH,), name="gate"), Op("Split", (_BOTH,), name="split")))
_UP = OneOf((Op("Slice", (_BOTH,), name="up"), Op("Split", (_BOTH,), name="split", output=1)))
_SILU = Op("Mul", (_GATE, Op("Sigmoid", (_GATE,))), commutative=True)
_RESULTS = Op("MatMul", (Op("Mul", (_SILU, _UP), commutative=True), _columns("down", [0, 2, 1])))
_LOCAL = Op("Gather", (Var("shares"), Var("expert_ids")), test=_attribute("axis", 1, 0))
_BY_EXPERT = Op("Unsqueeze", (Op("Transpose", (_LOCAL,), test=_attribute("perm", [1, 0])),), test=_axes(2))

EXPERTS = Op(
    "ReduceSum",
    (Op("Mul", (Through(("Cast",), _RESULTS), _BY_EXPERT), commutative=True),),
    test=lambda node: _axes(0)(node) or _attribute("keepdims", 0, 1)(node),
)

_LOGITS = Through(
    ("Cast",),
    OneOf(
        (
            Op("Gemm", (Var("x"), Var("router")), name="router_gemm"),
            Op("MatMul", (Var("x"), _columns("router", [1, 0])), name="router_product"),
        )
    ),
)
_K = Const("top_k", "one number", lambda value: value.size == 1)


def _top_k(of: Pattern, output: int) -> Op:
    return Op("TopK", (of, _K), name="top_k", output=output, test=_attribute("axis", -1, -1))


def _last_axis(node: gs.Node) -> str | None:
    rank = len(node.outputs[0].shape or (0, 0))
    axis = node.attrs.get("axis", -1)
    return None if axis % rank == rank - 1 else f"it works along axis {axis}, not the last"


def _scattered(weights: Pattern, chosen: Pattern) -> Op:
    zeros = Op("Expand", (Const("zero", "0", lambda value: value.size == 1 and float(value.item()) == 0.0),))
    return Op("ScatterElements", (zeros, chosen, weights), test=_attribute("axis", 1, 0))


def _softmax(of: Pattern) -> Op:
    return Op("Softmax", (of,), test=_last_axis)


_ROUTES = {
    NormalizationMode.RENORMALIZE: _scattered(_softmax(_top_k(_LOGITS, 0)), _top_k(_LOGITS, 1)),
    NormalizationMode.NONE: _scattered(_top_k(_softmax(_LOGITS), 0), _top_k(_softmax(_LOGITS), 1)),
}


@dataclass(frozen=True)
class Routing:
    """How a block routes; ``match`` binds ``x`` and ``router``."""

    mode: NormalizationMode
    top_k: int
    match: Match

    @property
    def router_is_transposed(self) -> bool:
        """Whether the router is stored ``[hidden, experts]``."""
        gemm = self.match.named.get("router_gemm")
        if gemm is not None:
            return not gemm.attrs.get("transB", 0)
        return "router_transpose" not in self.match.named


def routing_of(experts: Match) -> Routing | str:
    """The routing that makes the experts' shares, or why it is none of those known."""
    miss = Miss()
    for mode, pattern in _ROUTES.items():
        found = match_tensor(pattern, experts.tensors["shares"], miss)
        if found is None:
            continue
        if found.tensors["x"] is not experts.tensors["x"]:
            return f"the router reads {found.tensors['x'].name}, the experts {experts.tensors['x'].name}"
        return Routing(mode, int(found.scalar("top_k")), found)
    return f"the routing is none of those known: {miss.reason}"


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
