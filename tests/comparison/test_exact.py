"""Every op's body in float64 against the same body in float32, and against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from moecompiler.backends.onnxruntime_program import WeightCache, input_types, open_program
from moecompiler.comparison.exact import Exact, by_expert
from moecompiler.comparison.nodes import OpNode, as_the_op_says, op_node, select, weights_of
from moecompiler.graph import Program
from moecompiler.materializing import Materializer

if TYPE_CHECKING:
    from programs import Subject

QUANTIZED = ("moe", "linear")
FORMATS = {"none": None, "cache_int8": ("attention",), "cache_fp8": ("attention",)} | dict.fromkeys(
    ("int8", "int4", "int4_asymmetric", "nvfp4", "fp8"), QUANTIZED
)
SIZES = {"batch": 2, "sequence": 3}


def arrays_for(node: OpNode) -> dict[str, np.ndarray]:
    """Numbers for what a node is fed, by the graph's names."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (dtype, shape) in input_types(node.program).items():
        sizes = [dim if isinstance(dim, int) else SIZES.get(dim, 6) for dim in shape]
        if dtype.kind == "i":
            arrays[name] = rng.integers(0, 20, sizes).astype(dtype)
        else:
            arrays[name] = rng.standard_normal(sizes).astype(dtype)
    return arrays


def exact(node: OpNode, subject: Subject, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    case = {name: feeds[tensor] for name, tensor in node.fed.items()}
    (found,) = Exact(as_the_op_says(node))(weights_of(node, Materializer(subject.reader)), [case])
    return found


@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=pytest.mark.slow) if f in ("int8", "int4") else f for f in FORMATS]
)
def test_bodies(shipped: Subject, fused: Callable[..., Program], form: str) -> None:
    """All of a layer's nodes and the last norm's, in float32, which float64 is near."""
    program = fused(form=form)
    nodes = [op_node(program, node) for node in select(program.model, [1], FORMATS[form])]
    assert len(nodes) >= 1
    for node in nodes:
        feeds = arrays_for(node)
        session = open_program(node.program, WeightCache(shipped.reader), 1)
        body = dict(zip((v.name for v in session.get_outputs()), session.run(None, feeds), strict=True))
        for name, value in exact(node, shipped, feeds).items():
            got = body[node.outputs[name]]
            scale = np.abs(value).max()
            # what is rounded to codes may end on the other side of a middle
            off = np.abs(got - value) > 1e-5 * scale
            assert off.mean() < (0.05 if node.op.endswith(("Fp8", "Cache")) else 1e-9), (node.name, name)
            assert value.dtype == (np.float64 if got.dtype.kind == "f" else got.dtype)
            assert scale > 1e-3


def test_experts_by_themselves_add_up(shipped: Subject, fused: Callable[..., Program]) -> None:
    program = fused(form="int4_asymmetric")
    (node,) = (op_node(program, each) for each in select(program.model, layers=[0], ops=["moe"]))
    feeds, weights = arrays_for(node), weights_of(node, Materializer(shipped.reader))
    parts = list(by_expert(weights | {"router": feeds[node.inputs["router"]]}))
    assert len(parts) == 8
    assert parts[3]["expert_ids"].tolist() == [3]
    assert parts[3]["router"].shape == (8, 128)
    np.testing.assert_array_equal(parts[3]["down_codes"], weights["down_codes"][3 * 128 : 4 * 128])
    assert (parts[3]["gate_up_zero_points"] == weights["gate_up_zero_points"][3 * 512 : 4 * 512]).all()
    whole = Exact(as_the_op_says(node))
    by_one = exact(node, shipped, feeds)["y"]
    feeds64 = {name: feeds[tensor] for name, tensor in node.fed.items()}
    together = whole._run(whole._values(weights), feeds64)["y"]
    np.testing.assert_allclose(by_one, together, rtol=1e-12, atol=1e-12)


def test_selection(fused: Callable[..., Program]) -> None:
    model = fused().model
    everything = select(model)
    assert [node.op_type for node in select(model, ops=["moe"])] == ["MoE"] * 4
    assert [node.op_type for node in select(model, [1], ["attention", "addrmsnorm"])] == [
        "AddRMSNorm",
        "Attention",
        "AddRMSNorm",
    ]
    assert len(select(model, range(4))) == len(everything) - 1  # the last norm is of no layer
