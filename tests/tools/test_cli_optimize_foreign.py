"""``optimize IN.onnx --output OUT.onnx``: what it makes runs, IN stays, and nothing is left half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli import Here, contents
from foreign_files import gated_layer, ops, outputs, save

from moecompiler.tools import optimize_foreign

WHOLE = ["Transpose", "MatMul", "Sigmoid", "Mul", "Identity", "Constant", "Mul", "Mul", "MatMul"]
SETTLED = ["MatMul", "Sigmoid", "Mul", "Mul", "MatMul"]


@pytest.mark.parametrize("external", [False, True])
def test_the_result_runs_where_it_is(external: bool, here: Here, tmp_path: Path) -> None:
    given, made = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    made.mkdir()
    source = save(gated_layer(), given / "model.onnx", external=external)
    before, wanted = contents(given), outputs(source)
    output = here("optimize", source, "--output", made / "model.onnx")
    assert (output.status, output.err) == (0, "")
    assert output.out.endswith("rewrites, 9 → 5 nodes\n")
    assert contents(given) == before
    assert {*contents(made)} == {"model.onnx", "model.safetensors"}
    assert (ops(source), ops(made / "model.onnx")) == (WHOLE, SETTLED)
    np.testing.assert_allclose(outputs(made / "model.onnx"), wanted, rtol=1e-5, atol=1e-6)
    # the same bytes again, and nothing more to do in what was made
    first = contents(made)
    assert here("optimize", source, "--output", made / "model.onnx").status == 0
    assert contents(made) == first
    again = here("optimize", made / "model.onnx", "--output", tmp_path / "again.onnx")
    assert again.out.endswith(" 0 rewrites, 5 → 5 nodes\n")


def test_graphs_between_passes(here: Here, tmp_path: Path) -> None:
    """Each runs; those of an earlier run go, but nothing else that is in their folder."""
    source, made = save(gated_layer(), tmp_path / "in.onnx", external=True), tmp_path / "out.onnx"
    arguments = ("optimize", source, "--output", made)
    assert here(*arguments, "--dump_passes").status == 0
    dumps = tmp_path / "out.passes"
    names = ("given", "constant-folding", "clean-up", "constant-folding", "clean-up")
    files = [f"{index:02}-{name}.onnx" for index, name in enumerate(names)]
    assert sorted(contents(dumps)) == [*files, "weights.safetensors"]
    for file in files:
        np.testing.assert_allclose(outputs(dumps / file), outputs(source), rtol=1e-5, atol=1e-6)
    (dumps / "notes.txt").write_text("mine")
    assert here(*arguments, "--dump_passes=changed", "--no_dump_weights").status == 0
    assert sorted(contents(dumps)) == [*files[:3], "notes.txt"]
    assert here(*arguments).status == 0
    assert sorted(contents(dumps)) == ["notes.txt"]


def test_a_run_that_fails_leaves_what_there_was(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While weights are written, and with the user's own interruption too."""
    source, made = save(gated_layer(), tmp_path / "in.onnx", external=True), tmp_path / "out.onnx"
    for there in (False, True):
        if there:
            assert here("optimize", source, "--output", made).status == 0
        before = contents(tmp_path)
        for error, status in ((OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)):

            def fails(parts: list[tuple[Path, object]], *arguments: object, raised: BaseException = error) -> None:
                parts[0][0].write_bytes(b"half")
                raise raised

            with monkeypatch.context() as patch:
                patch.setattr(optimize_foreign, "pack", fails)
                output = here("optimize", source, "--output", made, "--dump_passes")
            assert output.status == status
            assert contents(tmp_path) == before
            assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_folder_that_is_not_there(here: Here, tmp_path: Path) -> None:
    path = save(gated_layer(), tmp_path / "in.onnx", external=False)
    assert_refused(
        here, (path, "--output", tmp_path / "no" / "out.onnx"), "cannot be written: No such file or directory"
    )


def _opset_17(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 17


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def _outside(model: onnx.ModelProto) -> None:
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../secret.data"


def _missing(model: onnx.ModelProto) -> None:
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "missing.data"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_opset_17, "is of opset 17; export it with opset_version=21"),
        (_cycle, "before it is written (a cycle?)"),
        (_outside, "outside the file's own folder: it is not read"),
        (_missing, "which is missing: copy it beside the ONNX file"),
    ],
)
def test_broken_files(change: Callable[[onnx.ModelProto], None], said: str, here: Here, tmp_path: Path) -> None:
    path = save(gated_layer(), tmp_path / "in.onnx", external=True)
    broken = onnx.load(path, load_external_data=False)
    change(broken)
    path.write_bytes(broken.SerializeToString())
    assert_refused(here, (path, "--output", tmp_path / "out.onnx"), said)


def assert_refused(here: Here, arguments: tuple[object, ...], said: str) -> None:
    output = here("optimize", *arguments)
    assert (output.status, output.out) == (2, "")
    (line,) = output.err.splitlines()
    assert line.startswith("moecompiler: error: ")
    assert said in line


def test_arguments_that_make_no_sense(here: Here, tmp_path: Path) -> None:
    path = save(gated_layer(), tmp_path / "in.onnx", external=True)
    text = tmp_path / "text.onnx"
    text.write_text("hello")
    before = contents(tmp_path)
    mine = save(gated_layer(), tmp_path / "mine.onnx", external=False)
    moved = onnx.load(path, load_external_data=False)
    for tensor in moved.graph.initializer:
        tensor.external_data[0].value = "out.safetensors"
    (tmp_path / "out.safetensors").write_bytes((tmp_path / "in.onnx.data").read_bytes())
    (tmp_path / "moved.onnx").write_bytes(moved.SerializeToString())
    out = ("--output", tmp_path / "out.onnx")
    for arguments, said in (
        ((text, *out), "text.onnx: is not an ONNX file"),
        ((tmp_path / "no.onnx", *out), "no.onnx: cannot be read: No such file or directory"),
        ((path,), "optimize IN.onnx takes --output OUT.onnx"),
        ((path, *out, "--output_dir", tmp_path / "x"), "optimize IN.onnx takes --output OUT.onnx"),
        ((*out, "--checkpoint_dir", tmp_path), "give --checkpoint_dir and --output_dir, or an ONNX file and --output"),
        ((path, "--output", tmp_path / "out"), "give a name that ends in .onnx"),
        ((mine, "--output", mine), "mine.onnx is read by"),
        ((tmp_path / "moved.onnx", *out), "out.safetensors is read by"),
        ((path, *out, "--print_after", "fuse-moe"), "--print_after fuse-moe: is not in pipeline ootb"),
    ):
        assert_refused(here, arguments, said)
    assert before.items() <= contents(tmp_path).items()
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_that_is_no_mixtral(here: Here, tmp_path: Path) -> None:
    """What applies is done. That passes which look for parts of a Mixtral find none is said, and an error for a pass that was
    asked for by its name."""
    path, out = save(gated_layer(), tmp_path / "in.onnx", external=False), tmp_path / "out.onnx"
    output = here("optimize", path, "--output", out, "--pipeline", "plugins")
    assert output.status == 0
    (note,) = output.err.splitlines()
    assert note.startswith(f"note: {path}: has no norms, attention or experts that fuse-rms-norm, fuse-attention, ")
    assert ops(out) == SETTLED
    only = (path, "--output", out, "--pipeline", "plugins", "--only_pass", "fuse-moe")
    assert_refused(here, only, f"pass fuse-moe: found nothing in {path}")
    assert here("optimize", *only, "--allow_missed").status == 0
    assert ops(out) == WHOLE


def test_a_module_that_looks_like_a_mixtral_s(here: Here, tmp_path: Path) -> None:
    model = gated_layer()
    for node in model.graph.node:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'model.layers.0.mlp.experts', 'op']")
    path = save(model, tmp_path / "in.onnx", external=False)
    arguments = (path, "--output", tmp_path / "out.onnx", "--pipeline", "plugins")
    assert_refused(here, arguments, "pass fuse-moe: did not match in model.layers.0.mlp.experts (nearest miss: ")
    output = here("optimize", *arguments, "--allow_missed")
    assert output.status == 0
    assert f"note: {path}: pass fuse-moe did not match in model.layers.0.mlp.experts" in output.err


NORM = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 4] x) => (float[n, 4] y) <float two = {2}, float[1] e = {0.01}, int64[1] last = {-1}, float[4] w = {1, 2, 3, 4}>
{
    ["model.norm/Pow_0"] square = Pow (x, two)
    ["model.norm/ReduceMean_1"] mean = ReduceMean <keepdims=1> (square, last)
    ["model.norm/Add_2"] shifted = Add (mean, e)
    ["model.norm/Sqrt_3"] root = Sqrt (shifted)
    ["model.norm/Div_4"] scaled = Div (x, root)
    ["model.norm/Mul_5"] y = Mul (scaled, w)
}"""


def test_a_result_is_taken_again(here: Here, tmp_path: Path) -> None:
    """With its fused ops, the names that say where nodes come from, and the shapes that are known."""
    source, made, again = (tmp_path / f"{name}.onnx" for name in ("in", "out", "again"))
    onnx.save(onnx.parser.parse_model(NORM), source)
    assert here("optimize", source, "--output", made, "--pipeline", "plugins", "--disable_pass", "fuse-moe").status == 0
    graph = onnx.load(made).graph
    assert [(node.name, node.op_type) for node in graph.node] == [("model.norm/RMSNorm_5", "RMSNorm")]
    output = here("optimize", made, "--output", again, "--pipeline", "plugins")
    assert output.out.endswith(" 0 rewrites, 1 → 1 nodes\n")
    assert here("passes", "diff", made, again).status == 0
    output = here("passes", "explain", source, "model.norm", "--pipeline", "plugins", "--only_pass", "fuse-rms-norm")
    assert "01-fuse-rms-norm: 1 rewrite, nodes: 6 removed, 1 made" in output.out
