"""What routing looks like, in its three modes: from the router's logits to every expert's share of every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.config import SPARSE_MIXER_EPSILON, NormalizationMode
from moecompiler.passes.moe_patterns import attribute_is, axes_are, columns
from moecompiler.passes.pattern import (
    VIEWS,
    Const,
    Match,
    Miss,
    OneOf,
    Op,
    Pattern,
    Through,
    Var,
    match_all,
    producer_of,
)


def _is(number: float) -> Const:
    def same(value: np.ndarray) -> bool:
        return value.size == 1 and bool(np.isclose(float(value.item()), number, rtol=1e-5, atol=0))

    return Const(f"the number {number}", str(number), same)


def _last_axis(node: gs.Node) -> str | None:
    rank = len(node.outputs[0].shape or (0, 0))
    axis = node.attrs.get("axis", -1)
    return None if axis % rank == rank - 1 else f"it works along axis {axis}, not the last"


def _is_product(gemm: gs.Node) -> str | None:
    """A Gemm that is no more than a product, perhaps with a transposed weight."""
    if len(gemm.inputs) > 2 and not gemm.inputs[2].is_empty():
        return "it adds a bias"
    factors = [gemm.attrs.get(name, default) for name, default in (("alpha", 1.0), ("transA", 0))]
    return None if factors == [1.0, 0] else f"its alpha and transA are {factors}, not 1 and 0"


_X = Through(VIEWS, Var("x"))  # transformers' router reshapes what is [tokens, hidden] already
_ROUTER = Through(
    ("Cast",),
    OneOf(
        (
            Op("Gemm", (_X, Var("router")), name="router_gemm", test=_is_product),
            Op("MatMul", (_X, columns("router", [1, 0])), name="router_product"),
        )
    ),
)
_LOGITS = Var("logits")
_LOWEST = Const(
    "lowest", "a number that softmax makes 0", lambda value: value.size == 1 and float(value.item()) < -1e30
)


def _softmax(of: Pattern) -> Op:
    return Op("Softmax", (of,), test=_last_axis)


def _top_k(of: Pattern, output: int) -> Op:
    k = Const("top_k", "one number", lambda value: value.size == 1)
    return Op(
        "TopK", (of, k), name="top_k", output=output, test=lambda n: _last_axis(n) or attribute_is("largest", 1, 1)(n)
    )


def _sparse_mixer(top_k: int) -> tuple[Pattern, Pattern]:
    """Weights and experts of ``top_k`` rounds of: the largest that is left, against the softmax over what is close to it."""
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
        return weights[0], chosen[0]

    def of_all_rounds(node: gs.Node) -> str | None:
        return _last_axis(node) or (None if len(node.inputs) == top_k else f"it joins {len(node.inputs)} rounds")

    return Op("Concat", tuple(weights), test=of_all_rounds), Op("Concat", tuple(chosen), test=of_all_rounds)


def _removes_what_is_chosen(node: gs.Node) -> str | None:
    """What is put in place of a chosen logit: the lowest number, in a tensor of one shape or another."""
    fill = producer_of(node.inputs[2])
    value = fill.attrs.get("value") if fill is not None and fill.op == "ConstantOfShape" else None
    if value is None and fill is not None and fill.op == "Expand" and isinstance(fill.inputs[0], gs.Constant):
        value = fill.inputs[0]
    lowest = value is not None and float(np.asarray(value.values).reshape(-1)[0]) < -1e30
    return _last_axis(node) or (None if lowest else "it does not put the lowest number in place of the chosen")


_MOST_SPARSE_MIXER_ROUNDS = 4


@dataclass(frozen=True)
class Route:
    """A way of routing: patterns of the chosen experts' weights and numbers, ``[tokens, top_k]``, over ``logits``. ``top_k`` is
    None where the graph says it, not the pattern."""

    mode: NormalizationMode
    top_k: int | None
    weights: Pattern
    chosen: Pattern

    @property
    def shares(self) -> Op:
        """Every expert's share of every token, ``[tokens, experts]``: zeros, with the chosen ones' weights put in."""
        return Op(
            "ScatterElements", (Op("Expand", (_is(0.0),)), self.chosen, self.weights), test=attribute_is("axis", 1, 0)
        )


def _sums_last_axis(node: gs.Node) -> str | None:
    return axes_are(-1)(node) or attribute_is("keepdims", 1, 1)(node)


def routes() -> list[Route]:
    """The ways of routing that are known."""
    likeliest, number = _top_k(_softmax(_LOGITS), 0), _top_k(_softmax(_LOGITS), 1)
    # As transformers writes RENORMALIZE: softmax over all, the top k, divided by their sum. That is the softmax over the top k:
    # exp grows, so they are the same k, and the sum over all experts, a factor of each, cancels.
    divided = Op("Div", (likeliest, Op("ReduceSum", (likeliest,), test=_sums_last_axis)))
    return [
        Route(NormalizationMode.RENORMALIZE, None, _softmax(_top_k(_LOGITS, 0)), _top_k(_LOGITS, 1)),
        Route(NormalizationMode.RENORMALIZE, None, divided, number),
        Route(NormalizationMode.NONE, None, likeliest, number),
        *(
            Route(NormalizationMode.SPARSE_MIXER, rounds, *_sparse_mixer(rounds))
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


def routing_of(x: gs.Tensor, pairs: Callable[[Route], Sequence[tuple[Pattern, gs.Tensor]]]) -> Routing | str:
    """The way of routing whose ``pairs`` of patterns and tensors match, or why none of those known is; ``x`` is what the experts
    read, and the router has to."""
    miss = Miss()
    for route in routes():
        choice = match_all(pairs(route), miss)
        if choice is None:
            continue
        apart = Miss()
        product = match_all([(_ROUTER, choice.tensors["logits"])], apart, Match({"x": x}))
        if product is None:
            return f"the router is not a product with what the experts read{apart.where}"
        whole = Match(
            {**choice.tensors, **product.tensors},
            {**choice.named, **product.named},
            (*choice.nodes, *product.nodes),
        )
        return Routing(route.mode, route.top_k or int(choice.scalar("top_k")), whole)
    return f"the routing is none of those known{miss.where}"
