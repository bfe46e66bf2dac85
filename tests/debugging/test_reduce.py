"""A rewrite cut out of its graph: a folder that shows the mistake, and shows when it is mended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from planted import STEPS, LargeEpsilon, MakeSubject, SwappedGateAndUp, passes_with

from moecompiler.debugging import reduce as reduce_module
from moecompiler.debugging.bisect import Culprit, bisect, culprit_of
from moecompiler.debugging.reduce import errors, reduce_rewrite
from moecompiler.debugging.reduced_folder import reproduce, write_folder
from moecompiler.debugging.subject import ExportedRanks
from moecompiler.passes.fuse_moe import FuseMoE
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import Pass, run_passes
from moecompiler.validation.difference import outputs_differ

pytestmark = pytest.mark.xdist_group("debugging")
FUSE = named_pipelines()["plugins"][len(named_pipelines()["ootb"]) :]


def find(subject: ExportedRanks, steps: tuple[Pass, ...]) -> Culprit:
    reference = subject.run(subject.load())
    return bisect(
        subject, steps, lambda probe: outputs_differ(subject.run(probe.programs), reference, subject.tolerance).passed
    )


def test_a_planted_mistake_reproduces_from_the_folder_alone(subject_of: MakeSubject, tmp_path: Path) -> None:
    subject = subject_of("ep2")
    steps = passes_with(SwappedGateAndUp(3), STEPS)
    culprit = find(subject, steps)
    assert culprit.change is not None
    assert culprit.change.module == "model.layers.2.mlp.experts"
    reduced = reduce_rewrite(subject, steps, culprit)
    assert len(reduced.before.model.graph.node) < 40
    assert max(errors(reduced.actual, reduced.expected).values()) > 0.1
    write_folder(reduced, subject.reader, tmp_path, {"pass": culprit.name}, "read me")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 5e6
    # as a stranger would: in a fresh process, and with nothing but onnxruntime
    for options, status, said in (([], 1, "the graphs differ"), (["--rerun"], 0, "the graphs agree")):
        done = subprocess.run(
            [sys.executable, tmp_path / "repro.py", *options], capture_output=True, text=True, check=False, cwd="/"
        )
        assert (done.returncode, done.stdout.splitlines()[-1]) == (status, said), done.stderr
    with np.load(tmp_path / "inputs.npz") as held:
        inputs = {key.replace("%2F", "/"): held[key] for key in held.files}
    results = []
    for name in ("before.onnx", "after.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / name)
        results.append(session.run(None, {each.name: inputs[each.name] for each in session.get_inputs()})[0])
    assert np.linalg.norm(results[1] - results[0]) > 0.1 * np.linalg.norm(results[0])
    assert json.loads((tmp_path / "rewrite.json").read_text())["seeded_weights"] is False


def test_large_weights_are_replaced_by_random_ones(
    subject_of: MakeSubject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduce_module, "LARGEST_WEIGHTS", 1000)
    subject = subject_of("ep2")
    steps = passes_with(SwappedGateAndUp(3), STEPS)
    reduced = reduce_rewrite(subject, steps, find(subject, steps))
    write_folder(reduced, subject.reader, tmp_path, {"pass": "fuse-moe"}, "")
    assert reduced.seeded
    assert not (tmp_path / "weights.safetensors").exists()
    assert (reproduce(tmp_path), reproduce(tmp_path, (FuseMoE(),))) == (1, 0)


def test_every_pass_s_rewrite_can_be_made_again(subject_of: MakeSubject, tmp_path: Path) -> None:
    """The graph that is cut out holds all that the pass looks at, and no more than a layer."""
    subject = subject_of("one-rank")
    _, results = run_passes(FUSE, subject.load()[0])
    made = [(step, result.changes) for step, result in zip(FUSE, results, strict=True) if result.changes]
    assert len(made) > 5
    for step, changes in made:
        culprit = culprit_of(subject, FUSE, 0, changes[len(changes) // 2].number)
        reduced = reduce_rewrite(subject, FUSE, culprit)
        assert len(reduced.before.model.graph.node) <= 130
        folder = tmp_path / step.name
        folder.mkdir()
        write_folder(reduced, subject.reader, folder, {"pass": step.name}, "")
        assert (reproduce(folder), reproduce(folder, (step,))) == (0, 0)
        assert run_passes((step,), reduced.before, allow_missed=True)[1][0].matches > 0, step.name


def test_the_smallest_graph_around_a_norm(subject_of: MakeSubject) -> None:
    subject = subject_of("pp2")
    steps = passes_with(LargeEpsilon(5), STEPS)
    reduced = reduce_rewrite(subject, steps, find(subject, steps))
    assert [node.op_type for node in reduced.after.model.graph.node] == ["RMSNorm"]
    assert len(reduced.inputs) == 1
