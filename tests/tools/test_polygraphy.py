"""docs/polygraphy.md: its commands are run as they stand, on a small checkpoint; what differs is found to."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from checkpoints import save_hf, tiny_config
from cli import BIN, TESTS, Here, Output

from moecompiler.errors import UserError
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.tools.polygraphy import __main__ as behind_plugins
from moecompiler.tools.polygraphy import inputs, model
from moecompiler.tools.polygraphy.runner import EngineRunner
from moecompiler.validation.engines import Engine

PAGE = TESTS.parent / "docs" / "polygraphy.md"
SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
pytestmark = pytest.mark.xdist_group("polygraphy")


def commands(mark: str) -> list[list[str]]:
    """The lines of the page's blocks with this mark, as words."""
    blocks = re.findall(rf"^```bash{mark}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for line in "".join(blocks).splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands find a checkpoint, and leave what they write for the next."""
    path = tmp_path_factory.mktemp("polygraphy")
    save_hf(path / "mixtral", tiny_config(**SIZES), tokenizer=True)
    return path


class Typed:
    """Runs the page's commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys, self._here = capsys, Here(capsys)

    def __call__(self, *words: str) -> Output:
        if words[0] == "moecompiler":
            return self._here(*words[1:])
        self._capsys.readouterr()
        if words[0] == "polygraphy":
            status = polygraphy(list(words[1:]))
        else:
            module = {"inputs": inputs, "model": model}[words[2].rpartition(".")[2]]
            status = module.main(words[3:])
        said = self._capsys.readouterr()
        return Output(status, said.out, said.err)


def polygraphy(words: list[str]) -> int:
    from polygraphy.logger import G_LOGGER
    from polygraphy.tools import main

    with G_LOGGER.verbosity(G_LOGGER.INFO):
        return int(main(run_opts=words))


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    return Typed(capsys)


@pytest.mark.slow
def test_every_command_of_the_page(typed: Typed) -> None:
    said = {}
    for command in commands(" runnable"):
        output = typed(*command)
        assert output.status == 0, f"{command}\n{output.out}{output.err}"
        said[" ".join(command)] = output.out
    assert len(said) == 12
    inspected, compared, other, two, _, _, _ = (text for line, text in said.items() if line.startswith("polygraphy"))
    assert "[Op: Attention]" in inspected
    assert "vs. PyTorch | Passed: 3/3 iterations" in compared
    assert re.search(r"onnxrt-runner-\S+ vs. moecompiler-\S+ \| Passed: 3/3 iterations", other), other
    assert "logits [dtype=float16, shape=(1, 300)]" in two  # half the vocabulary, twice
    assert {"TopK", "MatMul"} <= {node.op_type for node in onnx.load("moe.onnx").graph.node}
    assert [node.op_type for node in onnx.load("reduced.onnx").graph.node] == ["TopK"]
    # the comparison with PyTorch's numbers is one: other weights are found
    weights = Path("engine/rank0.safetensors")
    held = weights.read_bytes()
    weights.write_bytes(held[: -len(held) // 4] + bytes(len(held) - len(held[: -len(held) // 4])))
    assert typed(*next(line for line in commands(" runnable") if "--load-outputs" in line)).status == 1


def test_the_page_s_commands_for_tensorrt_are_ones_that_polygraphy_knows(typed: Typed, tmp_path: Path) -> None:
    """Without TensorRT none can run: Polygraphy writes the script that each would be."""
    scripts = []
    for program, *words in commands(""):
        if program == "python" and words[1] == "moecompiler.tools.polygraphy":
            program, words = "polygraphy", words[2:]
        if program == "polygraphy" and words[0] in ("run", "convert"):
            as_run = ["--trt"] if words[0] == "convert" else []
            words = [word for word in words[1:] if not as_run or word not in ("-o", "parsed.plan")]
            made = typed("polygraphy", "run", *words, *as_run, "--gen-script", str(tmp_path / "script.py"))
            assert made.status == 0, made.err
            scripts.append((tmp_path / "script.py").read_text())
    through_us, with_plugins = scripts
    assert "EngineRunner('trt/rank0.plan')" in through_us
    assert "preview_features=[trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03]" in with_plugins
    assert "strongly_typed=True" in with_plugins


def test_a_rank_of_two_as_a_runner(engines: Callable[[str], Path]) -> None:
    """By itself: its half of the logits, twice, and a cache of what it wrote; tokens are of its half of the vocabulary."""
    directory = engines("ep2")
    feeds = {
        "input_ids": np.array([[1005, 1006, 1007]]),
        "position_ids": np.arange(3)[None],
        "last_token_ids": np.array([2]),
    }
    with EngineRunner(str(directory / "rank1.onnx")) as runner:
        metadata = runner.get_input_metadata(use_numpy_dtypes=False)
        caches = {name: np.zeros((1, *each.shape[1:]), np.float32) for name, each in metadata.items() if "past" in name}
        outputs = runner.infer(feeds | caches)
    assert outputs["logits"].shape == (1, 1536)
    np.testing.assert_array_equal(*np.split(outputs["logits"], 2, axis=1))
    written = np.abs(outputs["present.0.key"]).max(axis=(0, 1, 3)) > 0
    assert np.flatnonzero(written).tolist() == [0, 1, 2]


def test_inputs_of_a_type_that_polygraphy_cannot_make_are_float32(
    engines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As engines of TensorRT have them, which take float32 in place of bfloat16."""
    types = {"input_ids": np.dtype(np.int64), "past_key_values.0.key": np.dtype(ml_dtypes.bfloat16)}
    engine = Engine(lambda example: pytest.fail("is not run"), types, object(), None)  # type: ignore[arg-type]
    monkeypatch.setattr("moecompiler.tools.polygraphy.runner.open_engine", lambda *arguments, **options: engine)
    with EngineRunner(str(engines("one") / "rank0.plan")) as runner:
        metadata = runner.get_input_metadata(use_numpy_dtypes=False)
    assert [str(each.dtype) for each in metadata.values()] == ["int64", "float32"]


@pytest.mark.parametrize(
    ("file", "said"), [("model.onnx", "is no engine"), ("rank0.onnx", "moecompiler did not write it")]
)
def test_what_is_no_engine_is_refused_in_a_line(typed: Typed, tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).write_bytes(b"")
    output = typed("polygraphy", "run", str(tmp_path / file), "--moecompiler")
    assert output.status == 1
    assert said in output.err
    assert "Traceback" not in output.err


@pytest.mark.parametrize(
    ("tool", "words", "said"),
    [
        ("inputs", ["nowhere", "--output_dir", "x"], "nowhere: not found"),
        ("inputs", ["{one}", "--output_dir", "x", "--rank", "1"], "--rank 1"),
        ("inputs", ["{one}", "--output_dir", "x", "--steps", "0"], "give 1 or more"),
        ("model", ["{one}", "--output_dir", "x"], "holds stage 'engine' where 'optimize' is needed"),
        ("model", ["{one}/optimize", "--output_dir", "x", "--plugins", "maybe"], "--plugins: 'maybe' is none of"),
        ("model", ["{one}/optimize", "--output_dir", "x", "--plugins", "on"], "the graph has no fused ops"),
        (
            "model",
            ["{one}/optimize", "--output_dir", "x", "--plugins", "on", "--compute_capability", "90"],
            "as in 8.9",
        ),
    ],
)
def test_what_is_refused(typed: Typed, engines: Callable[[str], Path], tool: str, words: list[str], said: str) -> None:
    filled = [word.format(one=engines("one")) for word in words]
    output = typed("python", "-m", f"moecompiler.tools.polygraphy.{tool}", *filled)
    assert (output.status, len(output.complaints), output.out) == (2, 1, "")
    assert said in output.complaints[0]
    assert not Path("x").exists()


def test_plugins_are_registered_before_polygraphy_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(TensorRTPlugins, "register", lambda self: happened.append("plugins"))
    monkeypatch.setattr("polygraphy.tools.main", lambda: happened.append("polygraphy") or 3)
    assert behind_plugins.main() == 3
    assert happened == ["polygraphy"] if importlib.util.find_spec("tensorrt") is None else ["plugins", "polygraphy"]
    happened.clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorrt")
    assert behind_plugins.main() == 3
    assert happened == ["plugins", "polygraphy"]


def test_plugins_that_cannot_be_registered_are_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: TensorRTPlugins) -> None:
        raise UserError("numpy 2")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorrt")
    monkeypatch.setattr(TensorRTPlugins, "register", refuse)
    assert behind_plugins.main() == 2
    assert capsys.readouterr().err == "moecompiler: error: numpy 2\n"
