"""Programs of one op, or of a chain: they run, and their profiles name what is free."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from moecompiler.graph import DOMAIN, Program
from moecompiler.plugins.attention.op import ATTENTION
from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM, RMS_NORM
from moecompiler.tools.bench_attention import Case
from moecompiler.tools.bench_engine_attention import CASES, sizes_of
from moecompiler.tools.one_node_program import chain, one_node, profile


def run(program: Program, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(program.model.SerializeToString())
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_chain_of_norms(length: int) -> None:
    """Weights of 1 and -1 turn signs in every node, and a norm of a norm is the same."""
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    weight = np.array([1, -1] * 4, np.float32)
    program = chain(RMS_NORM, {"epsilon": 0.0}, {"hidden": 8}, "float32", length)
    onnx.checker.check_model(program.model, full_check=True)
    assert [node.domain for node in program.model.graph.node] == [DOMAIN] * length
    assert len({node.name for node in program.model.graph.node}) == length
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True))
    np.testing.assert_allclose(run(program, {"x": x, "weight": weight}), normed * weight**length, rtol=1e-5)


def test_profiles_of_leading_dims() -> None:
    bounds = {"batch": 1, "sequence": 1}, {"batch": 2, "sequence": 8}, {"batch": 4, "sequence": 16}
    shapes = profile(ADD_RMS_NORM, {"hidden": 64}, bounds)
    assert shapes == dict.fromkeys(("residual", "branch"), ((1, 1, 64), (2, 8, 64), (4, 16, 64)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_has_the_shapes_of_its_case(case: Case) -> None:
    """What the benchmark binds is what the engine takes."""
    sizes = sizes_of(case)
    program = one_node(ATTENTION, case.attributes, sizes, "float16")
    shapes = profile(ATTENTION, sizes, ({"batch": case.batch, "sequence": case.new},) * 3)
    for value, dims in zip(program.model.graph.input, case.dims, strict=True):
        assert shapes[value.name] == (dims,) * 3
        declared = [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        assert all(known in (size, "batch", "sequence") for known, size in zip(declared, dims, strict=True))
