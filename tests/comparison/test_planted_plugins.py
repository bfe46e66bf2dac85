"""A plugin that is wrong in one node, for one shape, expert or slot: found alone by the op level, named by bisection, and
reproduced by the folder it is reduced to."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import save_hf, tiny_config
from planted_plugins import Bug, ForgetsSlot, PlantedPlugins, WrongExpert, WrongForTokens

from moecompiler.artifact import Artifact
from moecompiler.backends.base import EngineLimits
from moecompiler.comparison.bisect import Judgement
from moecompiler.comparison.capture import capture
from moecompiler.comparison.ddmin import Outcome
from moecompiler.comparison.op_level import measure_ops
from moecompiler.dummy import open_source
from moecompiler.errors import UserError
from moecompiler.graph import load_program
from moecompiler.materializing import Materializer
from moecompiler.plugin_switches import PluginSwitches, parse_plugins
from moecompiler.runtime.communicator import Alone
from moecompiler.tools.backend import open_backend
from moecompiler.tools.build import run_build
from moecompiler.tools.comparison.bisection import STATE, bisect_plugins, flags_of, tactics_of
from moecompiler.tools.comparison.node_programs import node_programs
from moecompiler.tools.comparison.reduced import main, write_reduced
from moecompiler.tools.flags import WorkFlags
from moecompiler.tools.job import Job
from moecompiler.tools.main import main as command_line
from moecompiler.validation.difference import outputs_differ
from moecompiler.validation.engine_run import engine_logits
from moecompiler.validation.scenario import Scenario
from moecompiler.validation.tolerances import TOLERANCES

pytestmark = pytest.mark.xdist_group("planted_plugins")
BOUNDS = replace(TOLERANCES["float16"], logits=0.05)  # several times what is rounded here
TOKENS = 17  # of the prompt; the token after it gets the cache's last slot
MODEL = tiny_config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Engines with all plugins, what they were built from, and what engines without any say in a short run."""
    directory = tmp_path_factory.mktemp("planted")
    save_hf(directory / "model", MODEL)
    engines, source = compiled(directory / "model", directory / "engines")
    flags, max_seq_len = flags_of(engines, parse_plugins("off"))
    run_build(source, directory / "ootb", flags, WorkFlags(), max_seq_len)
    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (1, TOKENS + 1))
    scenario = Scenario("planted", tokens, (TOKENS,), 1)
    job = Job.of(engines)
    plugins = sorted(engines.rank_info(0)["engine"]["plugins"].items(), reverse=True)
    nodes = {op: name for name, op in plugins}  # of the first layer: what is wrong there reaches all tokens
    return SimpleNamespace(
        model=directory / "model",
        engines=engines,
        source=source,
        job=job,
        reader=open_source(job.source, job.model),
        scenario=scenario,
        expected=logits(Artifact.open(directory / "ootb", ("engine",)), scenario),
        nodes=nodes,
    )


def compiled(model: Path, directory: Path, *words: str) -> tuple[Artifact, Artifact]:
    """Engines and the graphs they were built from."""
    own = ["--max_seq_len", str(TOKENS + 1), "--dtype", "float16", "--plugins", "on", "--max_batch_size", "1"]
    folders = ["--model_dir", str(model), "--output_dir", str(directory)]
    assert command_line(["compile", *folders, *own, *words]) == 0
    return Artifact.open(directory, ("engine",)), Artifact.open(directory / "optimize", ("optimize",))


def logits(engines: Artifact, scenario: Scenario) -> np.ndarray:
    limits = EngineLimits(**engines.header["limits"])
    session = open_backend("onnxruntime").load(engines.directory, "rank0", limits, 1)
    found = engine_logits(session, Job.of(engines).mapping, scenario, Alone())
    assert found is not None
    return found


def bugs(built: SimpleNamespace) -> dict[str, Bug]:
    return {
        "tokens": WrongForTokens(built.nodes["MoE"], TOKENS),
        "expert": WrongExpert(built.nodes["MoE"], 3),
        "cache_end": ForgetsSlot(built.nodes["Attention"], -1),
    }


def plant(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend that is opened from now on has it."""
    for module in ("backend", "comparison.node_programs", "comparison.openers"):
        monkeypatch.setattr(f"moecompiler.tools.{module}.TensorRTPlugins", lambda: PlantedPlugins(bug))


KINDS = ["tokens", pytest.param("expert", marks=pytest.mark.slow), pytest.param("cache_end", marks=pytest.mark.slow)]
# the op level's cases that show it; an expert's tokens are in most of them
SHOWN_BY = {"tokens": {"real", "large", "one_expert", "ties", "ragged"}, "cache_end": {"cache_end"}}


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("none", marks=pytest.mark.slow)])
def test_the_op_level_finds_it_and_nothing_else(
    built: SimpleNamespace, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``none``: a plugin that would be wrong for a number of tokens that does not come up."""
    bug = bugs(built).get(kind, WrongForTokens(built.nodes["MoE"], TOKENS + 1))
    plant(bug, monkeypatch)
    op = "Attention" if kind == "cache_end" else "MoE"
    graph = load_program(built.source.path("rank0.onnx"))
    names = [node.name for node in graph.model.graph.node if node.op_type == op]
    (step, *_), lengths = built.scenario.steps(), np.array([TOKENS])
    captured = capture([graph], built.job.mapping, built.reader, step, names)
    level = measure_ops(
        captured,
        lengths,
        node_programs("onnxruntime", built.reader, threads=1),
        lambda rank: Materializer(built.reader),
    )
    assert {case.node for case in level.cases} == {*names}
    further = {(case.node, case.case) for case in level.cases if not case.no_further}
    assert {node for node, _ in further} == ({bug.node} if kind != "none" else set())
    assert {case for _, case in further} == SHOWN_BY.get(kind, {case for _, case in further})


@pytest.mark.parametrize("kind", KINDS)
def test_bisection_names_the_node_and_its_folder_reproduces_it(
    built: SimpleNamespace,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bug = bugs(built)[kind]
    plant(bug, monkeypatch)

    def judge(engines: Artifact, switches: PluginSwitches) -> Judgement:
        found = outputs_differ([logits(engines, built.scenario)], [built.expected], BOUNDS)
        return Judgement(Outcome.PASS if found.passed else Outcome.FAIL, found.max_abs)

    found = bisect_plugins(built.engines, built.source, judge, "logits", tmp_path / "work")
    assert [node.name for node in found.culprits] == [bug.node]
    assert (found.minimal, found.others) == (True, Outcome.PASS)
    assert len(found.probes) < 12
    assert [path.name for path in (tmp_path / "work").iterdir()] == [STATE]

    graphs = [load_program(built.source.path("rank0.onnx"))]
    names = [node.name for node in found.culprits]
    (tried,) = write_reduced(
        names,
        graphs,
        built.job.mapping,
        built.reader,
        built.scenario.steps(),
        "onnxruntime",
        tmp_path / "reduce",
        {},
        1,
    )
    assert tried.wrong
    shown = {"tokens": f"prefill, 1 × {TOKENS} tokens", "cache_end": "decode step 1, 1 × 1 tokens"}
    assert tried.what == shown.get(kind, tried.what)
    (folder,) = (tmp_path / "reduce").iterdir()
    facts = json.loads((folder / "plugin.json").read_text())
    assert (facts["node"], facts["wrong"], facts["backend"]) == (bug.node, True, "onnxruntime")
    assert not all(output["no_further"] for output in facts["outputs"])
    capsys.readouterr()
    assert main(folder, []) == 1
    assert "FURTHER FROM THE TRUTH" in capsys.readouterr().out
    monkeypatch.undo()  # from here on by the plugins as they are: mended
    if kind == "expert":  # as a stranger would
        done = subprocess.run(
            [sys.executable, folder / "repro.py"], capture_output=True, text=True, check=False, cwd="/"
        )
        assert (done.returncode, "no further from the truth" in done.stdout) == (0, True), done.stderr
    else:
        assert main(folder, []) == 0
        assert "no further from the truth" in capsys.readouterr().out


@pytest.mark.slow
def test_a_bug_that_does_not_show_is_no_finding(
    built: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(WrongForTokens(built.nodes["MoE"], TOKENS + 1), monkeypatch)

    def judge(engines: Artifact, switches: PluginSwitches) -> Judgement:
        found = outputs_differ([logits(engines, built.scenario)], [built.expected], BOUNDS)
        return Judgement(Outcome.PASS if found.passed else Outcome.FAIL, found.max_abs)

    with pytest.raises(UserError, match="with all 9 plugins the check says pass"):
        bisect_plugins(built.engines, built.source, judge, "logits", tmp_path)


@pytest.mark.slow
def test_compare_names_it_and_goes_on_where_it_stopped(
    built: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command: the model level fails, engines are bisected, the culprit is in the result and in a folder."""
    bug = bugs(built)["expert"]
    plant(bug, monkeypatch)
    monkeypatch.setattr("moecompiler.tools.comparison.bisection.code_fingerprint", lambda: "the same")
    words = ["--level", "model", "--tokens", "24", "--prompts", "0", "--work_dir", str(tmp_path), "--json"]
    found = []
    for _ in range(2):
        capsys.readouterr()
        assert command_line(["compare", str(built.engines.directory), *words]) == 1
        found.append(json.loads(capsys.readouterr().out)["bisection"])
    first, again = found
    assert first["check"].startswith("model: ")
    assert (first["culprits"], first["folder"]) == ([bug.node], str(tmp_path / "reduce"))
    assert again == first  # nothing is built twice
    (folder,) = (tmp_path / "reduce").iterdir()
    assert json.loads((folder / "plugin.json").read_text())["node"] == bug.node


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["--pp_size", "--tp_size"])
def test_nodes_of_several_ranks(
    built: SimpleNamespace,
    mapping: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of one stage alone, or of all ranks of a stage at once; without the weights, which are too large here."""
    engines, _ = compiled(built.model, tmp_path / "engines", mapping, "2")
    plugins = {name: op for rank in range(2) for name, op in engines.rank_info(rank)["engine"]["plugins"].items()}
    culprit = sorted(name for name, op in plugins.items() if op == "MoE")[0]
    plant(WrongExpert(culprit, 3), monkeypatch)
    monkeypatch.setattr("moecompiler.tools.comparison.reduced.LARGEST_WEIGHTS", 1000)
    if mapping == "--tp_size":
        monkeypatch.setattr("moecompiler.tools.comparison.reduced.LARGEST_MODEL", 1000)
    words = ["--level", "model", "--tokens", "24", "--prompts", "0", "--work_dir", str(tmp_path / "work"), "--json"]
    capsys.readouterr()
    assert command_line(["compare", str(engines.directory), *words]) == 1
    found = json.loads(capsys.readouterr().out)["bisection"]
    assert found["culprits"] == [culprit]
    (folder,) = (tmp_path / "work" / "reduce").iterdir()
    assert json.loads((folder / "plugin.json").read_text())["seeded_weights"]
    assert not (folder / "weights.safetensors").exists()
    assert main(folder, []) == 1


@pytest.mark.slow
def test_probes_have_the_plans_that_the_engines_have(built: SimpleNamespace, tmp_path: Path) -> None:
    engines, source = compiled(built.model, tmp_path / "engines", "--plugin_tactics", "whole")
    seen: set[str] = set()

    def judge(probe: Artifact, switches: PluginSwitches) -> Judgement:
        tactics = tactics_of(probe)
        seen.update(tactic for node, tactic in tactics.items() if "MoE" in node)
        return Judgement(Outcome.FAIL if built.nodes["MoE"] in tactics else Outcome.PASS)

    found = bisect_plugins(engines, source, judge, "plans", tmp_path / "work")
    assert [node.name for node in found.culprits] == [built.nodes["MoE"]]
    assert seen == {"whole"}
