"""Experts as transformers' ``grouped_mm`` computes them and its own exporter writes them: choices sorted by expert.

With T tokens, k choices each and N = T * k: the choices are sorted by their expert's number, and each expert is computed on its
piece of the N rows, from where the one before ends to ``ends[expert]``; the results go back to their places and are summed over a
token's choices.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.passes.moe_patterns import attribute_is, axes_are, halves_differ, swiglu
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
    small_constant,
)

_ANY_NUMBER = "one number"


def _number(name: str, expected: float | None = None) -> Const:
    def test(value: np.ndarray) -> bool:
        return value.size == 1 and (expected is None or bool(np.isclose(float(value.item()), expected)))

    return Const(name, _ANY_NUMBER if expected is None else f"{expected:g}", test)


def _gathered(of: Pattern, places: Pattern) -> Pattern:
    """Rows ``places [N]`` of a tensor."""
    return OneOf(
        (
            Op("GatherND", (of, Through(VIEWS, places)), test=attribute_is("batch_dims", 0, 0)),
            Op("Gather", (of, places), test=attribute_is("axis", 0, 0)),
        )
    )


def _unmasked(of: Pattern) -> Pattern:
    """Rows of choices of experts that there are not are made 0; the number is compared with how many there are."""
    beyond = Op("GreaterOrEqual", (Var("sorted"), _number("beyond")))
    return OneOf((Op("Where", (Through(VIEWS, beyond), _number("masked", 0), of)), of))


_WEIGHTS = Through(VIEWS, _gathered(Through(VIEWS, Var("weights")), Var("perm")))
_WEIGHTED = Op("Mul", (Through(("Cast",), _unmasked(Var("results"))), Through(("Cast",), _WEIGHTS)), commutative=True)
_INVERSE = Op(
    "ScatterND",
    (Var("filled"), Through(VIEWS, Var("perm")), Var("places")),
    test=attribute_is("reduction", "none", "none"),
)

GROUPED_EXPERTS = Op(
    "ReduceSum",
    (Through(VIEWS, _gathered(_WEIGHTED, _INVERSE)),),
    name="sum",
    test=lambda node: axes_are(1)(node) or attribute_is("keepdims", 0, 1)(node),
)

# Numbers the places; matched by itself, because layers may share it.
_RANGE = Op("Range", (_number("start", 0), Var("count"), _number("step", 1)))

_SORTED, _PERM = (
    Op(
        "TopK",
        (Through(VIEWS, Var("chosen")), Var("all")),
        name="sort",
        output=output,
        test=lambda node: attribute_is("largest", 0, 1)(node) or attribute_is("sorted", 1, 1)(node),
    )
    for output in (0, 1)
)
_QUOTIENT = Op("Div", (Var("perm"), _number("top_k")))
# torch's floor division, of numbers that may be negative: less 1 where the quotient is, and there is a rest
_NEGATIVE = Op("Less", (Var("perm"), _number("negative", 0)))
_BORROW = Op(
    "And",
    (
        OneOf((Op("Equal", (_NEGATIVE, _number("true", 1)), commutative=True), _NEGATIVE)),
        Op("Cast", (Op("Mod", (Var("perm"), _number("top_k"))),)),
    ),
    commutative=True,
)
_TOKEN = OneOf((Op("Sub", (_QUOTIENT, Op("Cast", (_BORROW,)))), _QUOTIENT))
_ROWS = _unmasked(_gathered(Var("x"), _TOKEN))
_ONES = Op("Expand", (_number("one", 1),))
# Numbers of experts 0 … E - 1, put into E equally wide bins from 0 to E - 1 and the last one clipped, are in bins 0 … E - 1.
_BIN = Op(
    "Clip", (Op("Cast", (Op("Div", (Through((*VIEWS, "Cast"), Var("sorted")), _number("width"))),)),), name="bins"
)
_NOTHING = Const("nothing", "zeros", lambda value: value.ndim == 1 and not value.any())
_COUNTS = Op(
    "ScatterElements",
    (_NOTHING, _BIN, _ONES),
    test=lambda node: attribute_is("axis", 0, 0)(node) or attribute_is("reduction", "add", "none")(node),
)
_ENDS = Through(
    ("Cast",),
    Op(
        "CumSum",
        (Through(("Cast",), _COUNTS, any_type=True), _number("axis", 0)),
        test=lambda node: attribute_is("exclusive", 0, 0)(node) or attribute_is("reverse", 0, 0)(node),
    ),
    any_type=True,
)


def sorted_experts_of(found: Match) -> Match | str:
    """All of the block that ends in ``found``, by name ``x``, ``gate_up`` and ``down`` (both ``[experts, in, out]``), ``weights``
    and ``chosen``; or why it is none, and where."""
    down = _pieces(found.tensors["results"])
    if isinstance(down, str):
        return down
    miss = Miss()
    perm = {"perm": found.tensors["perm"]}
    inner = match_all([(swiglu(_unmasked(Var("both"))), down.tensors["rows"])], miss)
    if inner is None:
        return f"what lies between the products{miss.where}"
    gate_up = _pieces(inner.tensors["both"])
    if isinstance(gate_up, str):
        return gate_up
    if gate_up.tensors["ends"] is not down.tensors["ends"]:
        return "the two products of an expert take different pieces"
    miss = Miss()
    before: list[tuple[Pattern, gs.Tensor]] = [
        (_ENDS, down.tensors["ends"]),
        (_PERM, perm["perm"]),
        (_ROWS, gate_up.tensors["rows"]),
    ]
    source = match_all(before, miss, Match(perm))
    if source is None:
        return f"what sorts the choices{miss.where}"
    order = match_all([(_SORTED, source.tensors["sorted"])], miss, Match({}, {"sort": source.named["sort"]}))
    if order is None or match_all([(_RANGE, found.tensors["places"])], miss) is None:
        return f"what sorts the choices{miss.where}"
    weights = {"gate_up": gate_up.tensors["weight"], "down": down.tensors["weight"]}
    tensors = {**source.tensors, **weights, "weights": found.tensors["weights"], "chosen": order.tensors["chosen"]}
    parts = (found, down, inner, gate_up, source, order)
    nodes = {id(node): node for part in parts for node in part.nodes}
    whole = Match(tensors, {**inner.named, **source.named, **found.named}, tuple(nodes.values()))
    masked = [part.tensors["beyond"] for part in (found, inner, source) if "beyond" in part.tensors]
    return halves_differ(inner) or _sizes_differ(whole, masked) or whole


def _pieces(tensor: gs.Tensor) -> Match | str:
    """What a ``Concat`` of each expert's product with its piece of the rows is made of: ``rows``, ``weight`` and ``ends``."""
    concat = producer_of(tensor)
    if concat is None or concat.op != "Concat" or concat.attrs.get("axis") != 0:
        return f"{tensor.name} is not put together of pieces, expert by expert"
    found = Match({}, {}, (concat,))
    for expert, piece in enumerate(concat.inputs):
        miss = Miss()
        pattern = _piece(expert)
        step = match_all([(pattern, piece)], miss, Match({k: v for k, v in found.tensors.items() if k in _SAME}))
        if step is None:
            return f"the piece of expert {expert}{miss.where}"
        found = Match({**found.tensors, **step.tensors}, {}, (*found.nodes, *step.nodes))
    weight = found.tensors["weight"]
    if weight.shape[0] != len(concat.inputs):
        return f"{concat.name} joins the pieces of {len(concat.inputs)} experts, of {weight.shape[0]}"
    return found


_SAME = ("rows", "weight", "ends")


def _at(of: Pattern, start: Pattern, end: Pattern) -> Op:
    """A slice of the first axis."""
    return Op("Slice", (of, start, end, _number("first_axis", 0)))


def _end(expert: int) -> Pattern:
    return _at(Var("ends"), _number(f"{expert}", expert), _number(f"{expert + 1}", expert + 1))


def _piece(expert: int) -> Pattern:
    start = _end(expert - 1) if expert else _number("0", 0)
    matrix = Through(VIEWS, _at(Var("weight"), _number(f"{expert}", expert), _number(f"{expert + 1}", expert + 1)))
    return Op("MatMul", (_at(Var("rows"), start, _end(expert)), matrix))


def _sizes_differ(found: Match, masked: list[gs.Tensor]) -> str | None:
    experts, intermediate, hidden = found.tensors["down"].shape
    if found.tensors["gate_up"].shape != [experts, hidden, 2 * intermediate]:
        return f"{found.tensors['gate_up'].name} and {found.tensors['down'].name} do not go together"
    top_k = found.tensors["chosen"].shape[-1]
    if found.scalar("top_k") != top_k or found.named["sum"].inputs[0].shape[1:] != [top_k, hidden]:
        return f"rows are not of {top_k} choices for each token"
    if any(small_constant(tensor) is None or int(np.asarray(tensor.values).item()) < experts for tensor in masked):
        return f"rows of some of the {experts} experts are made 0"
    if found.named["sort"].outputs[0].shape != found.named["sort"].inputs[0].shape:
        return f"{found.named['sort'].name} does not sort all choices"
    limits = [small_constant(tensor) for tensor in found.named["bins"].inputs[1:3]]
    right = [None if each is None else int(each.item()) for each in limits] == [0, experts - 1]
    if not right or not np.isclose(found.scalar("width"), (experts - 1) / experts):
        return f"{found.named['bins'].name} does not count the choices of each expert"
    return None
