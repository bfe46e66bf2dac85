"""How the command line reads its arguments, and how it speaks when they are wrong."""

from __future__ import annotations

import pytest
from cli import TINY_MIXTRAL, Here

from moecompiler import __version__
from moecompiler.tools.main import VERBS, normalize


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], []),
        (["run", "--engine-dir", "a-b_c"], ["run", "--engine_dir", "a-b_c"]),
        (["--tp-size=2", "--tp_size=2"], ["--tp_size=2", "--tp_size=2"]),
        (["--output-dir=some-where/x"], ["--output_dir=some-where/x"]),
        (["--input_text", "one"], ["--input_text", "one"]),
        (["--input-text", "one", "two"], ["--input_text", "one", "--input_text", "two"]),
        (
            ["--input_text", "one", "two", "three", "--seed", "1"],
            ["--input_text", "one", "--input_text", "two", "--input_text", "three", "--seed", "1"],
        ),
        (
            ["--input_text", "one", "two", "--input_text", "three"],
            ["--input_text", "one", "--input_text", "two", "--input_text", "three"],
        ),
        (["--input_text", "", " "], ["--input_text", "", "--input_text", " "]),
        (["--input_text=--not-an-option", "x"], ["--input_text=--not-an-option", "x"]),
        (["--input_text", "-1 is a number", "b"], ["--input_text", "-1 is a number", "--input_text", "b"]),
        (["--engine_dir", "a", "b"], ["--engine_dir", "a", "b"]),
        (["inspect", "my-dir", "--json"], ["inspect", "my-dir", "--json"]),
        (["--"], ["--"]),
    ],
)
def test_normalize(given: list[str], wanted: list[str]) -> None:
    assert normalize(given) == wanted
    assert normalize(wanted) == wanted


def test_version(here: Here) -> None:
    assert (here("--version").out, here("--version").status) == (f"moecompiler {__version__}\n", 0)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, here: Here) -> None:
    output = here(verb, "--help")
    assert output.status == 0
    assert "Usage: moecompiler" in output.out


COMPILE = ("compile", "--model_dir", TINY_MIXTRAL, "--output_dir", "unused")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fly",), "No such command 'fly'"),
        (("run", "--engine_dir", "x"), "Missing option '--max_output_len'"),
        (("run", "--engine_dir", "x", "--max_output_len", "many"), "Invalid value for '--max_output_len'"),
        ((*COMPILE, "--use_smooth_quant"), "No such option: --use_smooth_quant"),
        ((*COMPILE, "--group_size", "64"), "--group_size 64: goes with --use_weight_only"),
        ((*COMPILE, "--dtype", "int8"), "'int8' is not one of"),
        ((*COMPILE, "--model", "8x7b"), "--model_dir and --model exclude each other"),
        (("compile", "--output_dir", "unused"), "give --model_dir, or --model"),
        (("compile", "--model_dir", "nowhere", "--output_dir", "unused"), "nowhere: not found"),
        (("compile", "--model", "9x9b", "--output_dir", "unused"), "9x9b: not found; give a preset"),
        ((*COMPILE, "--tp_size", "2", "--moe_ep_size", "4"), "= 4, but it must equal --tp_size 2"),
        ((*COMPILE, "--tp-size", "3"), "8 attention heads do not divide over 3 ranks"),
        ((*COMPILE, "--pp_size", "5"), "more stages than the model's 4 layers"),
        ((*COMPILE, "--tp_size", "0"), "--tp_size 0: a parallel size is at least 1"),
        ((*COMPILE, "--num_layers", "5"), "the model has 4 layers"),
        ((*COMPILE, "--max_seq_len", "2000"), "--max_seq_len 2000: give 2 to 1024"),
        ((*COMPILE, "--max_seq_len", "64", "--max_input_len", "64"), "--max_input_len 64: give 1 to 63"),
        ((*COMPILE, "--max_batch_size", "0"), "--max_batch_size 0: give 1 or more"),
        ((*COMPILE, "--pipeline", "fast"), "--pipeline fast: there is none of that name"),
        ((*COMPILE, "--backend", "abacus"), "--backend abacus: there is none of that name"),
        ((*COMPILE, "--workers", "0"), "Invalid value for '--workers'"),
        ((*COMPILE, "--tp_size", "2", "--rank", "2"), "--rank 2: the world has ranks 0 to 1"),
        (("build", "--checkpoint_dir", "nowhere", "--output_dir", "unused"), "nowhere: not found; make it with"),
        (("inspect", "nowhere"), "nowhere: not found"),
        (("validate", "nowhere"), "nowhere: not found"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: tuple[object, ...], said: str, here: Here, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        output = here(*arguments)
    assert output.status == 2
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("moecompiler: error: ")
    assert said in line
    assert not list(folder.iterdir())
