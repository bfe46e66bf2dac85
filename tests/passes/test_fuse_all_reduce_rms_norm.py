"""An all-reduce, the addition and the norm behind it become one op, where nothing else needs the sum."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import parser
from programs import GRID, MAX_SEQ_LEN, Passage, Programs, Subject, build_and_load, run_ranks

from moecompiler.backends.onnxruntime_program import open_program
from moecompiler.config import ExportOptions
from moecompiler.graph import DOMAIN, Program, check, is_collective
from moecompiler.ops import add_function
from moecompiler.passes.fuse_all_reduce_rms_norm import FuseAllReduceRMSNorm
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.passes.restore import Restore
from moecompiler.pipeline import apply, run_passes
from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.threads import run_in_threads

GRAPH = """
<ir_version: 10, opset_import: ["": 21, "moecompiler": 1]>
g (float[b, s, 8] r, float[t, 8] b1, float[b, s, 8] b2, int64[3] shape) => ({outputs})
<float[8] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[t, 8] sum, float[b, s, 8] branch, float[b, s, 8] x, float[b, s, 8] y,
 float[b, s, 8] more>
{{
{body}
}}
"""
REDUCED = '["m/AllReduce_1"] sum = moecompiler.AllReduce<group: ints = [0, 1]>(b1)'
NORMED = '["m/RMSNorm_1"] sum = moecompiler.RMSNorm<epsilon: float = 1.0>(b1, w)'
RESHAPED = """
  ["m/AllReduce_1"] sum = moecompiler.AllReduce<group: ints = [0, 1]>(b1)
  ["m/Reshape_2"] branch = Reshape(sum, shape)
  ["n/AddRMSNorm_3"] y, x = moecompiler.AddRMSNorm<epsilon: float = 0.01>(r, branch, w)
"""
PLAIN = """
  ["m/AllReduce_1"] branch = moecompiler.AllReduce<group: ints = [0, 1]>(b2)
  ["n/AddRMSNorm_3"] y, x = moecompiler.AddRMSNorm<epsilon: float = 0.01>(r, branch, w)
"""
BOTH = "float[b, s, 8] y, float[b, s, 8] x"


def program(body: str, outputs: str = BOTH) -> Program:
    model = parser.parse_model(GRAPH.format(body=body, outputs=outputs))
    add_function(model, ADD_RMS_NORM)
    return Program(model)


def run(made: Program) -> list[list[np.ndarray]]:
    """What ONNX Runtime makes of it on two ranks, whose branches differ."""

    def of(communicator: Communicator) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        residual, both = rng.standard_normal((2, 3, 8)), rng.standard_normal((2, 2, 3, 8))
        branch = both[communicator.rank].astype(np.float32)
        feeds = {"r": residual.astype(np.float32), "b1": branch.reshape(6, 8), "b2": branch}
        feeds["shape"] = np.array([2, 3, 8])
        session = open_program(made, None, 1, optimized=False)  # type: ignore[arg-type]  # there are no weights
        names = {value.name for value in session.get_inputs()}
        return session.run(None, {name: value for name, value in feeds.items() if name in names})

    return run_in_threads(2, of)


@pytest.mark.parametrize("body", [PLAIN, RESHAPED], ids=["plain", "reshaped"])
def test_fused(body: str) -> None:
    """Its body computes the same; a reshape goes before it, and what it then gives is called what it is."""
    before = program(body)
    after, result = apply(FuseAllReduceRMSNorm(), before)
    assert result.matches == 1
    check(after)
    ops = [node.op_type for node in after.model.graph.node]
    assert ops == (["Reshape"] if body is RESHAPED else []) + ["AllReduceAddRMSNorm"]
    fused = after.model.graph.node[-1]
    assert (fused.name, is_collective(fused)) == ("m/AllReduce_1", True)
    assert list(fused.input) == ["r", "branch/partial" if body is RESHAPED else "b2", "w"]
    assert [function.name for function in after.model.functions if function.name == fused.op_type] == [fused.op_type]
    for got, wanted in zip(run(after), run(before), strict=True):
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
    again, second = apply(FuseAllReduceRMSNorm(), after)
    assert second.matches == 0
    assert again.model.SerializeToString(deterministic=True) == after.model.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("body", "outputs", "why"),
    [
        (RESHAPED, f"{BOTH}, float[t, 8] sum", "sum is an output of the graph"),
        (PLAIN, f"{BOTH}, float[b, s, 8] branch", "branch is an output of the graph"),
        (PLAIN + "  more = Neg(branch)", f"{BOTH}, float[b, s, 8] more", "branch is read by others too"),
        (PLAIN.replace("(r, branch, w)", "(branch, r, w)"), BOTH, "its branch, r, is no all-reduce's"),
        (RESHAPED.replace("Reshape(sum, shape)", "Neg(b2)"), BOTH, "its branch, branch, is no all-reduce's"),
        (RESHAPED.replace(REDUCED, NORMED), BOTH, "its branch, branch, is no all-reduce's"),
    ],
)
def test_near_misses(body: str, outputs: str, why: str) -> None:
    import onnx_graphsurgeon as gs

    made = program(body, outputs)
    after, result = apply(FuseAllReduceRMSNorm(), made)
    assert result.matches == 0
    assert "AllReduceAddRMSNorm" not in {node.op_type for node in after.model.graph.node}
    graph = gs.import_onnx(made.model)
    norm = next(node for node in graph.nodes if node.op == "AddRMSNorm")
    assert why in str(FuseAllReduceRMSNorm().why_not(graph, {}, norm))


@pytest.fixture(scope="module")
def plain(shipped: Subject, programs: Programs) -> list[Program]:
    options = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)
    return [programs.optimized(shipped.config, GRID["ep2"], rank, options) for rank in range(2)]


@pytest.fixture(scope="module")
def fused(plain: list[Program]) -> list[Program]:
    return [run_passes(named_pipelines()["tensorrt"], each)[0] for each in plain]


def test_every_branch_of_the_shipped_model(fused: list[Program]) -> None:
    """But the last, whose sum has no norm behind it; embedding and that one stay."""
    for each in fused:
        ops = Counter(node.op_type for node in each.model.graph.node if node.domain == DOMAIN)
        assert (ops["AllReduceAddRMSNorm"], ops["AddRMSNorm"], ops["AllReduce"]) == (7, 0, 2)


def test_the_shipped_model_computes_the_same(
    plain: list[Program], fused: list[Program], shipped: Subject, passage: Passage, tmp_path: Path
) -> None:
    """From bodies, and from bodies put back."""
    restored = [apply(Restore(), each)[0] for each in fused]
    logits = []
    for name, variant in (("plain", plain), ("fused", fused), ("restored", restored)):
        (tmp_path / name).mkdir()
        logits.append(run_ranks(build_and_load(variant, shipped, tmp_path / name), GRID["ep2"], passage))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-5, rtol=0)
