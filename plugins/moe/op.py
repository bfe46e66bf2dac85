"""``MoE``: routing, local SwiGLU experts and their weighted sum, as ``MixtralSparseMoeBlock`` on one rank computes them.

The three ways of routing (``routing``) are three bodies of one op: the attribute ``normalization_mode`` says which, and a
graph holds one of them.
"""

from __future__ import annotations

from collections.abc import Callable

from moecompiler.config import SPARSE_MIXER_EPSILON, NormalizationMode
from moecompiler.ops import OpSpec, Value

_TOP_K = """
    top_k_scalar = Constant<value_int: int = @top_k>()
    vector = Constant<value_ints = [1]>()
    k = Reshape(top_k_scalar, vector)
"""

_ROUTE = {
    NormalizationMode.NONE: _TOP_K
    + """
    probabilities = Softmax<axis = -1>(logits)
    chosen_weights, chosen = TopK<axis = -1>(probabilities, k)
""",
    NormalizationMode.RENORMALIZE: _TOP_K
    + """
    chosen_logits, chosen = TopK<axis = -1>(logits, k)
    chosen_weights = Softmax<axis = -1>(chosen_logits)
""",
}


def _sparse_mixer(top_k: int) -> str:
    """``top_k`` rounds of: take the largest that is left, against the softmax over what is close to it."""
    lines = [
        "magnitude = Abs(logits)",
        "lowest = Constant<value_float = -3.4028234663852886e38>()",
        f"threshold = Constant<value_float = {2 * SPARSE_MIXER_EPSILON}>()",
        "last_axis = Constant<value_ints = [-1]>()",
        "remaining_0 = Identity(logits)",
    ]
    for i in range(top_k):
        lines += [
            f"largest_{i} = ReduceMax<keepdims = 1>(remaining_{i}, last_axis)",
            f"chosen_{i} = ArgMax<axis = -1, keepdims = 1>(remaining_{i})",
            f"gap_{i} = Sub(largest_{i}, logits)",
            f"factor_{i} = Max(magnitude, largest_{i})",
            f"distance_{i} = Div(gap_{i}, factor_{i})",
            f"far_{i} = Greater(distance_{i}, threshold)",
            f"near_{i} = Where(far_{i}, lowest, remaining_{i})",
            f"share_{i} = Softmax<axis = -1>(near_{i})",
            f"weight_{i} = GatherElements<axis = -1>(share_{i}, chosen_{i})",
            f"lowest_{i} = Expand(lowest, shape_{i})",
            f"remaining_{i + 1} = ScatterElements<axis = -1>(remaining_{i}, chosen_{i}, lowest_{i})",
        ]
        lines.insert(-2, f"shape_{i} = Shape(chosen_{i})")
    weights = ", ".join(f"weight_{i}" for i in range(top_k))
    experts = ", ".join(f"chosen_{i}" for i in range(top_k))
    lines += [f"chosen_weights = Concat<axis = -1>({weights})", f"chosen = Concat<axis = -1>({experts})"]
    return "\n    " + "\n    ".join(lines) + "\n"


_LOGITS = """
    router_columns = Transpose<perm = [1, 0]>(router)
    router_logits = MatMul(x, router_columns)
    logits = Cast<to = 1>(router_logits)
"""

_SHARES = """
    # every expert's weight for every token, and of these the local experts'
    logits_shape = Shape(logits)
    nothing = Constant<value_float = 0.0>()
    no_share = Expand(nothing, logits_shape)
    all_shares = ScatterElements<axis = 1>(no_share, chosen, chosen_weights)
    local_shares = Gather<axis = 1>(all_shares, expert_ids)
    shares_by_expert = Transpose<perm = [1, 0]>(local_shares)
    third_axis = Constant<value_ints = [2]>()
    shares = Unsqueeze(shares_by_expert, third_axis)
"""

_GATE_UP = """
    # down(silu(gate(x)) * up(x)) of every local expert on every token
    gate_up_columns = Transpose<perm = [0, 2, 1]>(gate_up)
    both = MatMul({x}, gate_up_columns)
    gate, up = Split<axis = -1, num_outputs = 2>(both)
    sigmoid = Sigmoid(gate)
    activated = Mul(gate, sigmoid)
    inner = Mul(activated, up)
"""

_DOWN = """
    down_columns = Transpose<perm = [0, 2, 1]>(down)
    results = MatMul({inner}, down_columns)

    wide_results = Cast<to = 1>(results)
    weighted = Mul(wide_results, shares)
    expert_axis = Constant<value_ints = [0]>()
    summed = ReduceSum<keepdims = 0>(weighted, expert_axis)
    y = CastLike(summed, x)
"""


def moe_body(mode: NormalizationMode, top_k: int, rounding: Callable[[str, str], str] | None = None) -> str:
    """The body for a way of routing: ``x``, ``router``, ``gate_up``, ``down`` and ``expert_ids`` → ``y``. ``top_k`` is an
    attribute too; only SPARSE_MIXER's body depends on it. ``rounding``: given a weight's name and what it is to be multiplied
    with, ``x`` or ``inner``, the text that makes ``rounded_x`` or ``rounded_inner``, ``[local experts, tokens, in]``, which
    experts get in place of that."""
    route = _sparse_mixer(top_k) if mode is NormalizationMode.SPARSE_MIXER else _ROUTE[mode]
    x, inner = ("x", "inner") if rounding is None else ("rounded_x", "rounded_inner")
    before = ("", "") if rounding is None else (rounding("gate_up", "x"), rounding("down", "inner"))
    experts = before[0] + _GATE_UP.format(x=x) + before[1] + _DOWN.format(inner=inner)
    return _LOGITS + route + _SHARES + experts


def moe_spec(mode: NormalizationMode, top_k: int) -> OpSpec:
    """The op for a way of routing."""
    return OpSpec(
        name="MoE",
        inputs=(
            Value("x", ("tokens", "hidden")),
            Value("router", ("experts", "hidden")),
            Value("gate_up", ("local_experts", "twice_intermediate", "hidden")),
            Value("down", ("local_experts", "hidden", "intermediate")),
            Value("expert_ids", ("local_experts",), "int64"),
        ),
        outputs=(Value("y", ("tokens", "hidden")),),
        attributes={"top_k": int, "normalization_mode": int},
        body=moe_body(mode, top_k),
        weights=("gate_up", "down"),
    )
