"""``compare``: two artifacts, one with plugins and without, and what it says of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import TINY_MIXTRAL, Here

from moecompiler.comparison.result import Result

SHORT = ("--tokens", "24", "--output_len", "3", "--prompts", "1", "--threads", "1")


def test_two_artifacts_of_one_model(here: Here, engines: Callable[[str], Path], tmp_path: Path) -> None:
    """One rank, and two that share attention and have experts of their own: graphs without fused ops, all but the op level."""
    report, work = tmp_path / "report", tmp_path / "work"
    folders = ("--output_dir", str(report), "--work_dir", str(work))
    said = here("compare", str(engines("one")), str(engines("ep2")), *folders, "--json", *SHORT)
    assert said.status == 0, said.err
    result = Result.from_json(json.loads(said.out))
    assert [program.name for program in result.meta.programs] == ["reference", "A", "B"]
    assert (result.meta.mapping.count("/"), result.meta.dtype) == (1, "float32")
    assert result.op is None
    assert result.layer is not None
    assert result.model is not None
    assert result.routing is not None
    assert result.passed
    assert len(result.layer.places) == 1 + 3 * 4
    assert all(0 < max(map(max, program.relative)) < 1e-4 for program in result.layer.programs)
    assert all(program.mean_kl < 1e-8 and program.top1 == 1 for program in result.model.programs)
    assert [greedy.equal for greedy in result.model.greedy[0].programs] == [3, 3]
    assert result.routing.replayed is not None
    assert not any(program.flips for program in result.routing.programs)
    assert json.loads((report / "result.json").read_text()) == json.loads(said.out)
    assert (report / "report.html").is_file()
    assert "op level" in said.err
    assert not list(work.glob("**/*.tmp*"))


@pytest.mark.slow
def test_plugins_and_plain_graph(here: Here, tmp_path: Path) -> None:
    """From an export: both programs are built, and what was built is used again."""
    export = tmp_path / "export"
    model = ("--model_dir", str(TINY_MIXTRAL), "--dtype", "float16", "--max_seq_len", "40", "--num_layers", "2")
    assert here("export", *model, "--output_dir", str(export)).status == 0
    said = here("compare", str(export), "--layers", "1", "--json", *SHORT)
    assert said.status == 0, said.err
    result = Result.from_json(json.loads(said.out))
    assert [program.name for program in result.meta.programs] == ["reference", "plugins", "ootb"]
    assert result.meta.programs[1].plugins == {"RMSNorm": 2, "Attention": 2, "AddRMSNorm": 3, "MoE": 2}
    assert result.meta.programs[1].build_seconds is not None
    assert result.op is not None
    assert {case.layer for case in result.op.cases} == {1}
    assert all(case.no_further for case in result.op.cases)
    assert result.routing is not None
    assert result.routing.replayed is not None
    again = here("compare", str(export), "--level", "op", "--ops", "rmsnorm", "--layers", "0", *SHORT)
    assert again.status == 0
    assert "ok   op: ratio of mean errors, model.layers.0.input_layernorm" in again.out
    page = json.loads((tmp_path / "export.compare" / "report" / "result.json").read_text())
    assert page["meta"]["programs"][1]["build_seconds"] is None
    nodes = ("--level", "op", "--layers", "0", "--ops", "rmsnorm")
    assert here("compare", str(export), "--bisect", *nodes, *SHORT).status == 2
    said = here("compare", "--matrix", str(export), str(export), *nodes, "--work_dir", str(tmp_path / "both"), *SHORT)
    assert said.status == 0
    assert said.out.startswith("export: within bounds\nexport-2: within bounds\n")
    table = json.loads((tmp_path / "both" / "report" / "matrix.json").read_text())
    assert {row["artifact"] for row in table["rows"]} == {"export", "export-2"}
    assert (tmp_path / "both" / "report" / "export-2" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("{one}", "--level", "ops"), "--level: there is no 'ops'; choose from op, layer, model, routing"),
        (("{one}", "--fail_on", "all"), "--fail_on: there is no 'all'"),
        (("{one}", "--ops", "conv"), "--ops: there is no op 'conv'"),
        (("{one}", "--tokens", "3"), "--tokens 3: give 8 or more"),
        (("{one}", "{one}", "{one}"), "compare takes one directory or two, not 3"),
        (("{one}", "{one}", "--level", "op"), "--level op: compares two programs of the same graphs"),
        (("{one}", "{endless}"), "are of different models"),
        (("{empty}",), "so moecompiler did not write it"),
        (("{empty}/nothing",), "not found"),
    ],
)
def test_bad_input_is_one_line(
    here: Here, engines: Callable[[str], Path], tmp_path: Path, words: tuple[str, ...], line: str
) -> None:
    places = {"one": engines("one"), "endless": engines("endless"), "empty": tmp_path / "empty"}
    places["empty"].mkdir()
    said = here("compare", *(word.format(**places) for word in words), "--work_dir", str(tmp_path / "work"))
    assert said.status == 2
    assert line in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not said.out
    assert not (tmp_path / "work").exists()
