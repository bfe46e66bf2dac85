"""Experts as transformers' ``batched_mm`` computes them: of each choice of a token, a product with the chosen expert's weights.

With T tokens, k choices each and N = T * k: ``x [T, H]`` is repeated to ``[N, H]``, the weights gathered to ``[N, 2F, H]`` and
``[N, H, F]``, and the results summed over a token's choices.
"""

from __future__ import annotations

from moecompiler.passes.moe_patterns import attribute_is, axes_are, swiglu
from moecompiler.passes.pattern import VIEWS, Const, Match, OneOf, Op, Pattern, Through, Var, small_constant

_NUMBERS = Through(VIEWS, Var("chosen"))
_LIMITS = tuple(Const(name, "one number", lambda value: value.size == 1) for name in ("lowest", "highest"))
_IDS = Through(VIEWS, OneOf((Op("Clip", (_NUMBERS, *_LIMITS), name="clip"), _NUMBERS)))


def _gathered(weight: str) -> Pattern:
    return OneOf(
        (
            Op("GatherND", (Var(weight), _IDS), name=f"gather_{weight}", test=attribute_is("batch_dims", 0, 0)),
            Op("Gather", (Var(weight), _IDS), test=attribute_is("axis", 0, 0)),
        )
    )


def _columns(of: Pattern) -> Pattern:
    """Rows as columns, ``[N, size]`` → ``[N, size, 1]``."""
    return OneOf((Op("Unsqueeze", (of,), test=axes_are(-1)), Op("Reshape", (of,))))


_ONCE_MORE = OneOf((Op("Unsqueeze", (Var("x"),)), Op("Reshape", (Var("x"),))))
_REPEATED = Through(VIEWS, OneOf(tuple(Op(op, (_ONCE_MORE,), name="repeated") for op in ("Expand", "Tile"))))
_BOTH = Through(VIEWS, Op("MatMul", (_gathered("gate_up"), _columns(_REPEATED))))
_RESULTS = Op("MatMul", (_gathered("down"), _columns(swiglu(_BOTH))))
_WEIGHTED = Op(
    "Mul",
    (Through((*VIEWS, "Cast"), _RESULTS), Through((*VIEWS, "Cast"), Var("weights"))),
    name="weighted",
    commutative=True,
)

BATCHED_EXPERTS = Op(
    "ReduceSum",
    (Through(VIEWS, _WEIGHTED),),
    name="sum",
    test=lambda node: axes_are(1)(node) or attribute_is("keepdims", 0, 1)(node),
)


def choices_differ(found: Match) -> str | None:
    """Why what is repeated, gathered and summed are not the choices of one token after another, or None."""
    x, gate_up, down = (found.tensors[name] for name in ("x", "gate_up", "down"))
    if len(gate_up.shape or ()) != 3 or len(down.shape or ()) != 3:
        return f"{gate_up.name} and {down.name} are not matrices of several experts"
    hidden, experts, top_k = down.shape[1], down.shape[0], (found.tensors["chosen"].shape or [None])[-1]
    if gate_up.shape != [experts, 2 * down.shape[2], hidden]:
        return f"{gate_up.name} of shape {gate_up.shape} does not go with {down.name} of shape {down.shape}"
    repeated, summed, weighted = (found.named[name] for name in ("repeated", "sum", "weighted"))
    if len(x.shape or ()) != 2:
        return f"what is repeated, {x.name} of shape {x.shape}, is not [tokens, hidden]"
    tokens = x.shape[0]
    for node, expected in ((repeated, [tokens, 1, hidden]), (summed, [tokens, top_k, hidden])):
        if node.inputs[0].shape != expected:
            return f"{node.name} reads {node.inputs[0].name} of shape {node.inputs[0].shape}, not {expected}"
    times = small_constant(repeated.inputs[1])
    if repeated.outputs[0].shape != [tokens, top_k, hidden] and (times is None or times.tolist() != [1, top_k, 1]):
        return f"{repeated.name} gives {repeated.outputs[0].shape}, not each token {top_k} times"
    if 1 not in [operand.shape[-1] for operand in weighted.inputs]:
        return f"{weighted.name} does not weight whole rows"
    for gather in (found.named.get(f"gather_{weight}") for weight in ("gate_up", "down")):
        if gather is not None and gather.inputs[1].shape[-1] != 1:
            return f"{gather.name} gathers by more than the expert's number"
    return _limits_differ(found, int(experts))


def _limits_differ(found: Match, experts: int) -> str | None:
    """A clip to the experts there are changes no expert's number."""
    if "clip" not in found.named:
        return None
    lowest, highest = (small_constant(found.tensors[name]) for name in ("lowest", "highest"))
    if lowest is None or highest is None or lowest.item() > 0 or highest.item() < experts - 1:
        return f"{found.named['clip'].name} changes numbers of the {experts} experts"
    return None
