"""``passes verify``, ``bisect`` and ``reduce``, and ``--verify_each``, as a user calls them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import TINY_MIXTRAL, Here
from planted import LargeEpsilon

from moecompiler.passes.pipelines import named_pipelines
from moecompiler.passes.selection import Selection

pytestmark = pytest.mark.xdist_group("passes-cli")
Engines = Callable[[str], Path]
TIDY = named_pipelines()["ootb"]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever passes are asked for, the last is this one, and it makes a mistake in layer 1."""
    monkeypatch.setattr(Selection, "passes", lambda self: (*TIDY, LargeEpsilon(3)))


def test_verify(engines: Engines, here: Here) -> None:
    output = here("passes", "verify", engines("one"), "--pipeline", "ootb,fuse-rms-norm", "--stop_after", "02-clean-up")
    assert output.status == 0, output.err
    lines = output.out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(" 0")] == [
        "00-given",
        "01-constant-folding",
        "02-clean-up",
    ]
    assert lines[-1] == "within tolerance after each of 2 passes"


def test_a_wrong_pass(planted: None, engines: Engines, here: Here, tmp_path: Path) -> None:
    """It is seen, named, found and cut out."""
    target = engines("one")
    output = here("passes", "verify", target, "--no_hf")
    assert output.status == 1
    assert output.out.splitlines()[-1] == (
        "OUT OF TOLERANCE after 05-fuse-rms-norm: it shows first in model.layers.1.self_attn;"
        " `moecompiler passes bisect` finds the rewrite"
    )
    folder = tmp_path / "reduced"
    output = here("passes", "bisect", target, "--json", "--reduce_to", folder)
    assert output.status == 0, output.err
    found = json.loads(output.out[output.out.index("{") :])
    assert (found["pass"], found["rank"]) == ("05-fuse-rms-norm", 0)
    assert found["rewrite"]["module"] == "model.layers.1.input_layernorm"
    assert json.loads((folder / "rewrite.json").read_text())["rewrite"] == found["rewrite"]
    output = here("passes", "reduce", target, "--output", folder)
    assert (output.status, "is there already" in output.err) == (2, True)


def test_verify_each_stops_a_compile(planted: None, engines: Engines, here: Here, tmp_path: Path) -> None:
    command = ("optimize", "--checkpoint_dir", engines("one") / "export", "--output_dir", tmp_path / "out")
    output = here(*command, "--verify_each")
    assert output.status == 2
    assert "OUT OF TOLERANCE after 05-fuse-rms-norm" in output.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert here(*command).status == 0  # nobody looked


def test_bisect_by_a_command(engines: Engines, here: Here, tmp_path: Path) -> None:
    """The command gets a folder with graphs and an engine directory; its own idea of what is good decides."""
    script = tmp_path / "check.py"
    script.write_text(
        "import sys, pathlib, onnx\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "assert (folder / 'engine' / 'manifest.json').is_file() and (folder / 'weights.safetensors').is_file()\n"
        "graph = onnx.load(folder / 'rank0.onnx', load_external_data=False).graph\n"
        "sys.exit(sum(node.op_type == 'RMSNorm' for node in graph.node) > 5)\n"
    )
    command = shlex.join([sys.executable, str(script), "{}"])
    output = here("passes", "bisect", engines("one"), "--command", command, "--pipeline", "ootb,fuse-rms-norm")
    assert output.status == 0, output.err
    assert "pass 05-fuse-rms-norm breaks the check" in output.out
    assert "model.layers.2.post_attention_layernorm" in output.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("verify", "nowhere"), "nowhere: not found"),
        (("verify", "nowhere.onnx"), "nowhere.onnx: cannot be read"),
        (("verify", TINY_MIXTRAL), "has no manifest.json"),
        (("bisect", "nowhere.onnx", "--command", ""), "--command: is empty"),
        (("reduce", "nowhere.onnx"), "Missing option '--output'"),
        (("fly",), "No such command 'fly'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: tuple[object, ...], said: str, here: Here) -> None:
    output = here("passes", *arguments)
    assert output.status == 2
    (line,) = output.err.splitlines()
    assert said in line
