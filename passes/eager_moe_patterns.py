"""Experts as transformers' ``eager`` loop computes them, unrolled by torch's tracing exporter (``dynamo=False``).

The loop goes over the experts that were hit when the model was traced, M of them; which those are is still data, so the graph
runs where exactly M experts are hit. Each step finds the tokens that chose its expert, computes them with its weights, and adds
them to the sum so far.
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
)

_NO_BROADCAST = ("Expand", "Cast")  # torch expands what it adds at an index, to the shape that it has


def _one(name: str, number: int) -> Const:
    return Const(name, str(number), lambda value: value.size == 1 and int(value.item()) == number)


def _of_expert(weight: str) -> Pattern:
    """The matrix of one expert, as the right operand of a product."""
    gathered = Op("Gather", (Var(weight), Var("expert")), test=attribute_is("axis", 0, 0))
    return Op("Transpose", (gathered,), test=attribute_is("perm", [1, 0]))


_ROWS = Op("Gather", (Var("x"), Var("token")), test=attribute_is("axis", 0, 0))
_INNER = swiglu(Op("MatMul", (_ROWS, _of_expert("gate_up"))))
_RESULTS = Op("MatMul", (_INNER, _of_expert("down")))
# weights[token, choice], of weights [tokens, top_k] laid out as one column
_PLACE = Op(
    "Add",
    (Var("choice"), Op("Mul", (Var("token"), Const("top_k", "one number", lambda v: v.size == 1)), commutative=True)),
    commutative=True,
)
_TAKEN = Op("Gather", (Through(VIEWS, Var("weights")), _PLACE), name="taken", test=attribute_is("axis", 0, 0))
_WEIGHTS = Through(VIEWS, _TAKEN)
_WEIGHTED = Op("Mul", (Through(("Cast",), _RESULTS), Through(("Cast",), _WEIGHTS)), commutative=True)


def _is_zero(node: gs.Node) -> str | None:
    value = node.attrs.get("value")
    zero = value is None or not np.any(np.asarray(value.values, np.float64))
    return None if zero else "it does not fill with 0"


_ZEROS = OneOf((Op("ConstantOfShape", (), test=_is_zero), Const("zeros", "zeros", lambda value: not value.any())))
_INDEX = Through(("Expand",), Op("Unsqueeze", (Var("token"),), test=axes_are(1)))
_ADDED = Op(
    "ScatterElements",
    (_ZEROS, _INDEX, Through(_NO_BROADCAST, _WEIGHTED)),
    # a token chooses an expert once, so no place is written twice
    test=lambda node: attribute_is("axis", 0, 0)(node) or attribute_is("reduction", "none", "none")(node),
)


def _goes_on(node: gs.Node) -> str | None:
    """Why a sum is not the last of its block: another expert is added to it."""
    for reader in node.outputs[0].outputs:
        if reader.op == "Add" and any(_is_addend(each) for each in reader.inputs if each is not node.outputs[0]):
            return f"{reader.name} adds another expert to it"
    return None


def _is_addend(tensor: gs.Tensor) -> bool:
    producer = producer_of(tensor)
    return producer is not None and producer.op == "ScatterElements"


STEP = Op("Add", (Var("so_far"), _ADDED), name="step", commutative=True)
LAST_STEP = Op("Add", (Var("so_far"), _ADDED), name="step", commutative=True, test=_goes_on)

# Which tokens chose the expert, and as which of their choices.
_FOUND = Op(
    "Transpose", (Op("NonZero", (Through(("Cast",), Op("Gather", (Var("mask"), Var("expert"))), any_type=True),)),)
)
_CHOICE, _TOKEN = (
    Through(
        ("Squeeze", "Reshape"), Op("Split", (_FOUND,), name="places", output=output, test=attribute_is("axis", 1, 0))
    )
    for output in (0, 1)
)
_DEPTH = Const("experts", "one number", lambda value: value.size == 1)
_OFF_ON = Const("off_on", "0 and 1", lambda value: value.tolist() == [0, 1])
_MASK = Op(
    "Transpose",
    (Op("OneHot", (Var("chosen"), _DEPTH, _OFF_ON), test=attribute_is("axis", -1, -1)),),
    test=attribute_is("perm", [2, 1, 0]),
)


def _hit(step: int) -> Pattern:
    """The number of the expert that the loop's step is about, of those that any token chose."""
    count = Op("ReduceSum", (Var("mask"),), test=lambda n: axes_are(-1, -2)(n) or attribute_is("keepdims", 0, 1)(n))
    hit = Op("Transpose", (Op("NonZero", (Op("Greater", (count, _one("zero", 0))),)),))
    taken = Op("Split", (hit,), name="hit", output=step, test=attribute_is("axis", 0, 0))
    return Op("Gather", (Through(("Squeeze", "Reshape"), taken), _one("first", 0)), test=attribute_is("axis", 0, 0))


_SHARED = ("x", "weights", "gate_up", "down")


def loop_of(last: Match) -> Match | str:
    """The loop that ends in ``last``: what its steps share by name, ``chosen`` included, and all its nodes. Or why it is none:
    which step is not as the others, and where."""
    steps = _steps_of(last)
    if isinstance(steps, str):
        return steps
    shared = {name: last.tensors[name] for name in _SHARED}
    nodes = [node for step in steps for node in step.nodes]
    masks: dict[str, gs.Tensor] = {}
    for index, step in enumerate(steps):
        if reason := halves_differ(step) or _column_differs(step.named["taken"]):
            return f"step {index + 1}: {reason}"
        places = [(_hit(index), "expert"), (_TOKEN, "token"), (_CHOICE, "choice")]
        miss = Miss()
        known = Match({"expert": step.tensors["expert"], **masks})
        found = match_all([(pattern, step.tensors[name]) for pattern, name in places], miss, known)
        if found is None:
            return f"step {index + 1}{miss.where}"
        if len(found.named["hit"].outputs) != len(steps):
            return f"the sum is over {len(steps)} of {len(found.named['hit'].outputs)} experts hit"
        masks = {"mask": found.tensors["mask"]}
        nodes += found.nodes
    miss = Miss()
    mask = match_all([(_MASK, masks["mask"])], miss)
    if mask is None:
        return f"what finds the tokens of an expert{miss.where}"
    tensors = {**shared, "chosen": mask.tensors["chosen"]}
    whole = Match(tensors, {}, tuple({id(node): node for node in (*nodes, *mask.nodes)}.values()))
    return _sizes_differ(whole, int(mask.scalar("experts")), {int(step.scalar("top_k")) for step in steps}) or whole


def _steps_of(last: Match) -> list[Match] | str:
    """The loop's steps, the first one first."""
    steps = [last]
    while True:
        so_far = steps[0].tensors["so_far"]
        if match_all([(_ZEROS, so_far)], Miss()) is not None:
            return steps
        miss = Miss()
        step = match_all([(STEP, so_far)], miss, Match({name: last.tensors[name] for name in _SHARED}))
        if step is None:
            return f"{len(steps)} steps before the last{miss.where}"
        steps.insert(0, step)


def _column_differs(taken: gs.Node) -> str | None:
    column = taken.inputs[0]
    flatten = producer_of(column)
    if flatten is not None and flatten.op == "Flatten":  # its axis says it; shape inference may not
        beyond = list(flatten.inputs[0].shape or ())[flatten.attrs.get("axis", 1) :]
    else:
        beyond = list(column.shape or (0, 0))[1:]
    right = all(size == 1 for size in beyond)
    return None if right else f"{taken.name} takes weights out of {column.name}, which is not one column"


def _sizes_differ(loop: Match, depth: int, top_k: set[int]) -> str | None:
    weights, gate_up, down = (loop.tensors[name] for name in ("weights", "gate_up", "down"))
    if [len(each.shape or ()) for each in (weights, gate_up, down)] != [2, 3, 3]:
        return f"{weights.name}, {gate_up.name} and {down.name} are not weights of tokens and matrices of experts"
    if top_k != {weights.shape[1]}:
        return f"weights are taken at every {sorted(top_k)}th place, of {weights.shape[1]} for a token"
    if depth != gate_up.shape[0]:
        return f"{depth} experts are looked for, of {gate_up.shape[0]}"
    return None
