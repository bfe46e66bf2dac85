"""What attention looks like between its projections: heads, rotary embedding, and tests of what patterns cannot say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.graph import module_of, node_name
from moecompiler.passes.pattern import Const, Match, OneOf, Op, Pattern, Var, small_constant


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


def rotated(projection: str) -> Op:
    """``x * cos + rotate_half(x) * sin``. Every ``x`` is the same node, by its name; that the halves are the halves is for
    ``halves_differ`` to see."""
    whole = heads(projection)
    sliced = tuple(Op("Slice", (whole,), name=f"{projection}_{which}") for which in ("low", "high"))
    split = tuple(
        Op("Split", (whole,), name=f"{projection}_split", output=output, test=along_axis(-1)) for output in (0, 1)
    )
    turned = OneOf(
        tuple(Op("Concat", (_negated(high, projection), low), test=along_axis(-1)) for low, high in (sliced, split))
    )
    straight = Op("Mul", (whole, Var("cos")), commutative=True)
    return Op("Add", (straight, Op("Mul", (turned, Var("sin")), commutative=True)), commutative=True)


def _negated(of: Pattern, name: str) -> Pattern:
    minus_one = Const(f"{name}_minus_one", "-1", lambda value: value.size == 1 and float(value.item()) == -1)
    return OneOf((Op("Neg", (of,)), Op("Mul", (of, minus_one), commutative=True)))


def writes_cache(nodes: Sequence[gs.Node]) -> bool:
    """Whether keys and values are put into a cache among these nodes: what tells the two kinds of attention apart."""
    return any(node.op == "ScatterElements" for node in nodes)


def heads_shape(found: Match, projection: str) -> list[int | str]:
    return list(found.named[f"{projection}_heads"].outputs[0].shape)


def halves_differ(found: Match, projection: str) -> str | None:
    """Why what is rotated against each other is not the two halves of a head, or None."""
    size = heads_shape(found, projection)[-1]
    if not isinstance(size, int):
        return f"the head size of the {projection} is not known"
    split = found.named.get(f"{projection}_split")
    if split is not None:
        sizes = [output.shape[-1] for output in split.outputs]
        return None if sizes == [size // 2] * 2 else f"{split.name} gives {sizes} of {size}, not two halves"
    for which, bounds in (("low", (0, size // 2)), ("high", (size // 2, size))):
        node = found.named[f"{projection}_{which}"]
        values = [small_constant(tensor) for tensor in node.inputs[1:]]
        if any(value is None or value.size != 1 for value in values):
            return f"{node.name} does not slice one axis at constant places"
        start, end, axis = (int(value.item()) for value in values[:3] if value is not None)
        if (start, min(end, size), axis % 4) != (*bounds, 3):
            return f"{node.name} takes [{start}:{end}] of axis {axis}, not [{bounds[0]}:{bounds[1]}] of the last"
    return None


def rows(found: Match, projection: str, graph: gs.Graph) -> gs.Tensor:
    """The projection as ``[B, S, heads * D]``; one that is ``[B * S, heads * D]``, as a ``Gemm`` gives it, is reshaped."""
    tensor = found.tensors[projection]
    if len(tensor.shape or ()) == 3:
        return tensor
    split = found.named[f"{projection}_heads"].inputs[0]
    batch, length, count, size = split.shape
    name = node_name(module_of(found.nodes[0].name), f"Reshape_{projection}_{found.nodes[0].name.rpartition('_')[2]}")
    known = all(isinstance(dim, int) for dim in (count, size))
    reshaped = gs.Variable(f"{name}_output", split.dtype, [batch, length, count * size if known else None])
    shape = gs.Constant(f"{name}_shape", np.array([0, 0, -1], np.int64))
    graph.nodes.append(gs.Node("Reshape", name, {}, [split, shape], [reshaped]))
    return reshaped
