"""What routing looks like, in its three modes: from the router's logits to every expert's share of every token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.config import SPARSE_MIXER_EPSILON, NormalizationMode
from moecompiler.passes.moe_patterns import attribute_is, columns
from moecompiler.passes.pattern import Const, Match, Miss, OneOf, Op, Pattern, Through, Var, match_tensor, producer_of


def _is(number: float) -> Const:
    def same(value: np.ndarray) -> bool:
        return value.size == 1 and bool(np.isclose(float(value.item()), number, rtol=1e-5, atol=0))

    return Const(f"the number {number}", str(number), same)


def _last_axis(node: gs.Node) -> str | None:
    rank = len(node.outputs[0].shape or (0, 0))
    axis = node.attrs.get("axis", -1)
    return None if axis % rank == rank - 1 else f"it works along axis {axis}, not the last"


_ROUTER = Through(
    ("Cast",),
    OneOf(
        (
            Op("Gemm", (Var("x"), Var("router")), name="router_gemm"),
            Op("MatMul", (Var("x"), columns("router", [1, 0])), name="router_product"),
        )
    ),
)
_LOGITS = Var("logits")
_LOWEST = Const(
    "lowest", "a number that softmax makes 0", lambda value: value.size == 1 and float(value.item()) < -1e30
)


def _scattered(weights: Pattern, chosen: Pattern) -> Op:
    """Zeros for all experts, with the chosen ones' weights put in."""
    return Op("ScatterElements", (Op("Expand", (_is(0.0),)), chosen, weights), test=attribute_is("axis", 1, 0))


def _softmax(of: Pattern) -> Op:
    return Op("Softmax", (of,), test=_last_axis)


def _top_k(of: Pattern, output: int) -> Op:
    k = Const("top_k", "one number", lambda value: value.size == 1)
    return Op("TopK", (of, k), name="top_k", output=output, test=_last_axis)


def _sparse_mixer(top_k: int) -> Op:
    """``top_k`` rounds of: the largest that is left, against the softmax over what is close to it."""
    remaining: Pattern = _LOGITS
    weights: list[Pattern] = []
    chosen: list[Pattern] = []
    for _ in range(top_k):
        largest = Op("ReduceMax", (remaining,))
        index = Op("ArgMax", (remaining,), test=_last_axis)
        factor = Op("Max", (Op("Abs", (_LOGITS,)), largest), commutative=True)
        distance = Op("Div", (Op("Sub", (largest, _LOGITS)), factor))
        near = Op("Where", (Op("Greater", (distance, _is(2 * SPARSE_MIXER_EPSILON))), _LOWEST, remaining))
        weights.append(Op("GatherElements", (_softmax(near), index), test=_last_axis))
        chosen.append(index)
        remaining = Op("ScatterElements", (remaining, index), test=_removes_what_is_chosen)
    if top_k == 1:
        return _scattered(weights[0], chosen[0])

    def of_all_rounds(node: gs.Node) -> str | None:
        return _last_axis(node) or (None if len(node.inputs) == top_k else f"it joins {len(node.inputs)} rounds")

    return _scattered(Op("Concat", tuple(weights), test=of_all_rounds), Op("Concat", tuple(chosen), test=of_all_rounds))


def _removes_what_is_chosen(node: gs.Node) -> str | None:
    """What is put in place of a chosen logit: the lowest number, in a tensor of one shape or another."""
    fill = producer_of(node.inputs[2])
    value = fill.attrs.get("value") if fill is not None and fill.op == "ConstantOfShape" else None
    if value is None and fill is not None and fill.op == "Expand" and isinstance(fill.inputs[0], gs.Constant):
        value = fill.inputs[0]
    lowest = value is not None and float(np.asarray(value.values).reshape(-1)[0]) < -1e30
    return _last_axis(node) or (None if lowest else "it does not put the lowest number in place of the chosen")


_MOST_SPARSE_MIXER_ROUNDS = 4


def _routes() -> list[tuple[NormalizationMode, int | None, Op]]:
    """The ways of routing, and how many experts they choose where the pattern alone says so."""
    renormalized = _scattered(_softmax(_top_k(_LOGITS, 0)), _top_k(_LOGITS, 1))
    plain = _scattered(_top_k(_softmax(_LOGITS), 0), _top_k(_softmax(_LOGITS), 1))
    return [
        (NormalizationMode.RENORMALIZE, None, renormalized),
        (NormalizationMode.NONE, None, plain),
        *(
            (NormalizationMode.SPARSE_MIXER, rounds, _sparse_mixer(rounds))
            for rounds in range(1, _MOST_SPARSE_MIXER_ROUNDS + 1)
        ),
    ]


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
    for mode, rounds, pattern in _routes():
        choice = match_tensor(pattern, experts.tensors["shares"], miss)
        if choice is None:
            continue
        product = match_tensor(_ROUTER, choice.tensors["logits"], miss)
        if product is None:
            break
        if product.tensors["x"] is not experts.tensors["x"]:
            return f"the router reads {product.tensors['x'].name}, the experts {experts.tensors['x'].name}"
        whole = Match(
            {**choice.tensors, **product.tensors},
            {**choice.named, **product.named},
            (*choice.nodes, *product.nodes),
        )
        return Routing(mode, rounds or int(choice.scalar("top_k")), whole)
    return f"the routing is none of those known: {miss.reason}"
