"""Collectives as TensorRT runs them: what is around ``DistCollective`` makes of its result what ours is."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import program
from onnx import helper

from moecompiler.backends.tensorrt_collectives import lower_collectives
from moecompiler.errors import UserError

KINDS = {"float32": "float", "float16": "float16"}


def lowered(op: str, dtype: str, group: str, dims: str = "b, 3") -> tuple[onnx.ModelProto, tuple[int, ...]]:
    kind = KINDS[dtype]
    out = dims if op == "AllReduce" else "b, n"
    model = program(
        f'g ({kind}[{dims}] x) => ({kind}[{out}] y) {{ ["m/Op"] y = moecompiler.{op}<group = [{group}]>(x) }}'
    ).model
    return model, lower_collectives(model, dtype)


def run_as_ranks(model: onnx.ModelProto, xs: list[np.ndarray]) -> np.ndarray:
    """The first rank's result; the collective gets what the others hand in from other inputs of the graph."""
    at = next(index for index, node in enumerate(model.graph.node) if node.op_type == "DistCollective")
    node = model.graph.node[at]
    gathers = helper.get_node_attr_value(node, "collective_operation") == b"all_gather"
    assert helper.get_node_attr_value(node, "reduce_op") == (b"none" if gathers else b"sum")
    assert helper.get_node_attr_value(node, "nb_rank") == len(xs)
    others, before = [], {each.output[0]: each for each in model.graph.node[:at]}
    for rank in range(1, len(xs)):
        model.graph.input.append(
            helper.make_tensor_value_info(f"x{rank}", model.graph.input[0].type.tensor_type.elem_type, None)
        )
        others.append(f"x{rank}")
        if node.input[0] in before:  # the others prepare what they hand in, too
            prepared = onnx.NodeProto()
            prepared.CopyFrom(before[node.input[0]])
            prepared.input[0], prepared.output[0] = f"x{rank}", f"x{rank}/in"
            prepared.name = others[-1] = f"x{rank}/in"
            model.graph.node.insert(at, prepared)
            at += 1
    attributes = {"axis": 0} if gathers else {}
    stand_in = helper.make_node(
        "Concat" if gathers else "Sum", [node.input[0], *others], [node.output[0]], **attributes
    )
    model.graph.node[at].CopyFrom(stand_in)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x" if rank == 0 else f"x{rank}": x for rank, x in enumerate(xs)})[0]


def shares(ranks: int, dtype: str, *shape: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(100 * rng.standard_normal(shape)).astype(dtype) for _ in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", KINDS)
def test_all_reduce_adds_in_float32_and_rounds_once(ranks: int, dtype: str) -> None:
    model, group = lowered("AllReduce", dtype, ", ".join(str(4 + rank) for rank in range(ranks)))
    assert group == tuple(range(4, 4 + ranks))
    xs = shares(ranks, dtype, 64, 3)
    wanted = np.sum([x.astype(np.float32) for x in xs], axis=0, dtype=np.float32).astype(dtype)
    np.testing.assert_allclose(run_as_ranks(model, xs), wanted, rtol=1e-6 if dtype == "float32" else 0)


@pytest.mark.parametrize("dims", ["b, 3", "b, s, 3"])
def test_all_gather_joins_along_the_last_axis(dims: str) -> None:
    model, _ = lowered("AllGather", "float16", "0, 1, 2", dims)
    xs = shares(3, "float16", *((2, 3) if dims == "b, 3" else (2, 5, 3)))
    np.testing.assert_array_equal(run_as_ranks(model, xs), np.concatenate(xs, axis=-1))


def test_nothing_to_do_and_too_much() -> None:
    model = program("g (float[2] x) => (float[2] y) { y = Neg(x) }").model
    before = model.SerializeToString()
    assert lower_collectives(model, "float32") == ()
    assert model.SerializeToString() == before
    model = program(
        "g (float[2] x) => (float[2] z) { y = moecompiler.AllReduce<group = [0, 1]>(x)"
        " z = moecompiler.AllReduce<group = [0, 2]>(y) }"
    ).model
    with pytest.raises(UserError, match=r"several groups of ranks, \[\(0, 1\), \(0, 2\)\]"):
        lower_collectives(model, "float32")
