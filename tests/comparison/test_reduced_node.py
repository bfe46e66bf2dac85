"""A node's folder: what it refuses, and which of a node's runs it holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import program
from readers import ArrayReader

from moecompiler.backends.base import EngineLimits
from moecompiler.comparison.nodes import op_node
from moecompiler.comparison.op_level import Programs
from moecompiler.comparison.reduce_node import Tried, try_node, worst_of
from moecompiler.comparison.reduced_node_folder import FACTS, figures, read_node_folder, write_node_folder
from moecompiler.errors import UserError
from moecompiler.graph import Program
from moecompiler.mapping import Mapping
from moecompiler.materializing import Materializer
from moecompiler.ops import add_function
from moecompiler.plugins.rmsnorm.op import RMS_NORM
from moecompiler.tools.comparison.node_programs import node_programs
from moecompiler.tools.comparison.reduced import main, write_reduced
from moecompiler.validation.place import Arrays
from moecompiler.validation.scenario import random_scenario

NORM = "model.norm/RMSNorm"
READER = ArrayReader({})


def norm() -> Program:
    made = program(
        f"""g (float16[tokens, 8] x, float16[8] weight) => (float16[tokens, 8] y)
        {{ ["{NORM}"] y = moecompiler.RMSNorm <epsilon = 0.00001> (x, weight) }}"""
    )
    add_function(made.model, RMS_NORM)
    return made


class Scaled:
    """The body, its results times a factor, from a number of rows on: a plugin, or not quite."""

    def __init__(self, factor: float, rows: int):
        self.factor, self.rows = factor, rows

    def __call__(self, given: Program, examples: Sequence[Arrays]) -> Any:
        body: Any = node_programs("onnxruntime", READER).openers["ootb"](given, examples)
        infer = body.infer_impl

        def scaled(feeds: Arrays) -> Arrays:
            factor = self.factor if len(feeds["x"]) >= self.rows else 1
            return {name: (array * factor).astype(array.dtype) for name, array in infer(feeds).items()}

        body.infer_impl = scaled
        return body


def tried(factor: float, rows: int = 0) -> tuple[Tried, ...]:
    """On 3, 5 and 4 rows; wrong by ``factor`` from ``rows`` on."""
    given, rng = norm(), np.random.default_rng(0)
    node = op_node(given, given.model.graph.node[0])
    weight = np.ones(8, np.float16)
    inputs = [(f"{n} rows", {"x": rng.standard_normal((n, 8)).astype(np.float16), "weight": weight}) for n in (3, 5, 4)]
    ootb = node_programs("onnxruntime", READER).openers["ootb"]
    programs = Programs({"plugins": Scaled(factor, rows), "ootb": ootb}, frozenset())
    return try_node(node, inputs, programs, Materializer(READER))


def test_the_worst_of_a_node_s_runs_is_held() -> None:
    runs = tried(1.25, rows=5)
    assert [each.wrong for each in runs] == [False, True, False]
    assert worst_of(runs).what == "5 rows"


def test_what_is_no_number_is_furthest_off_and_can_be_written(tmp_path: Path) -> None:
    run = worst_of(tried(float("inf"), rows=4))
    assert run.wrong
    write_node_folder(run, READER, {"backend": "onnxruntime", "tactic": ""}, tmp_path)
    facts = json.loads((tmp_path / FACTS).read_text(), parse_constant=pytest.fail)
    assert facts["outputs"][0]["errors"]["plugins"]["max"] == "inf"
    assert "largest inf" in figures(run)[0]


def test_a_folder_of_a_node_that_is_right_says_so(tmp_path: Path) -> None:
    run = tried(1.0)[0]
    write_node_folder(run, READER, {"backend": "onnxruntime", "tactic": ""}, tmp_path)
    assert "By itself the node is within bounds" in (tmp_path / "README.md").read_text()
    node, inputs, _, facts = read_node_folder(tmp_path)
    assert (node.name, node.op, facts["inputs"]) == (NORM, "RMSNorm", "3 rows")
    assert {name: array.shape for name, array in inputs.items()} == {"x": (3, 8), "weight": (8,)}


@pytest.mark.parametrize(
    ("words", "spoil", "said"),
    [
        (["--backend", "tensorrt-rtx"], None, "give onnxruntime or tensorrt"),
        ([], FACTS, "is no folder of a reduced plugin"),
        ([], "inputs.npz", "is no folder of a reduced plugin"),
        ([], "node.onnx", "not found"),
    ],
)
def test_a_folder_that_cannot_be_run_is_one_line(
    words: list[str], spoil: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_node_folder(tried(1.0)[0], READER, {"backend": "onnxruntime", "tactic": ""}, tmp_path)
    if spoil:
        (tmp_path / spoil).unlink()
    assert main(tmp_path, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_ops_that_exchange_and_nodes_that_are_not_there_are_refused(tmp_path: Path) -> None:
    made = program(
        """g (float16[tokens, 8] r, float16[tokens, 8] b, float16[8] w) => (float16[tokens, 8] y, float16[tokens, 8] x)
        { ["model.norm/fused"] y, x = moecompiler.AllReduceAddRMSNorm <epsilon = 0.00001, group = [0, 1]> (r, b, w) }"""
    )
    steps = random_scenario(EngineLimits(1, 7, 8, 10)).steps()
    for name, said in (("model.norm/fused", "exchanges with other ranks"), ("model.norm/other", "there is no node")):
        with pytest.raises(UserError, match=said):
            write_reduced([name], [made], Mapping.create(), READER, steps, "onnxruntime", tmp_path / "reduce", {})
    assert not (tmp_path / "reduce").exists()
