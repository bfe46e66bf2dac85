"""Quantized engines compared on text: two formats on ONNX Runtime, and what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import ONE_RANK, TINY_MIXTRAL

from moecompiler.backends.base import EngineLimits
from moecompiler.errors import UserError
from moecompiler.tools.bench_quantized_engines import APART, main, pairs_of, scenario_of
from moecompiler.tools.main import main as command

SIZES = ("--model_dir", str(TINY_MIXTRAL), "--windows", "4", "--length", "24")


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts and attention as int4, under a name of a pair."""
    directory = tmp_path_factory.mktemp("engines") / "int4-on"
    words = ("--model_dir", str(TINY_MIXTRAL), "--output_dir", str(directory), *ONE_RANK)
    assert command(["compile", *words, "--qformat", "int4_wo", "--group_size", "64", "--pipeline", "plugins"]) == 0
    return directory


def test_formats_against_hf_and_each_other(
    int4: Path, engines: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More windows than the engines' batch. An engine that is not quantized, under the pair's other name, is not the same."""
    other, same = tmp_path / "int4-off", [tmp_path / "float-on", tmp_path / "float-off"]
    for path in (other, *same):
        path.symlink_to(engines("one"))
    assert main([str(tmp_path / "rows.json"), str(int4), str(other), *map(str, same), *SIZES]) == 1
    found = json.loads((tmp_path / "rows.json").read_text())
    quantized, exact, *_ = found["rows"]
    assert (quantized["engine"], quantized["format"], exact["format"]) == ("int4-on", "int4 per block 64", "none")
    assert quantized["tokens"] == 4 * 19 == exact["tokens"]
    assert exact["kl"] < 1e-9 < APART < quantized["kl"] < 0.2
    assert exact["perplexity"] == pytest.approx(exact["hf_perplexity"], rel=1e-4)
    assert quantized["increase"] == pytest.approx(quantized["perplexity"] / quantized["hf_perplexity"] - 1)
    assert exact["top1"] == 1
    assert [(pair["name"], pair["passed"]) for pair in found["pairs"]] == [("int4", False), ("float", True)]
    assert found["pairs"][0]["kl"] == pytest.approx(quantized["kl"], rel=1e-3)
    printed = capsys.readouterr().out
    assert "| int4-on | int4 per block 64 |  |" in printed
    assert "plugins against none: NOT THE SAME" in printed


def test_pairs() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 16))
    found = {"a-on": logits + 5, "a-off": logits, "b-on": logits, "c-off": logits, "d-on": np.full_like(logits, np.nan)}
    first, second = pairs_of(found | {"d-off": logits})
    assert (first.name, first.top1, first.passed) == ("a", 1.0, True)
    assert first.kl == pytest.approx(0, abs=1e-12)
    assert (second.name, second.passed) == ("d", False)


def test_rounded_activations_may_differ_as_roundings_do() -> None:
    """By twice the smaller of both divergences from HF: what is further off itself gives no more room."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 64, 16))
    found = {"a-on": logits + 0.1 * rng.standard_normal(logits.shape), "a-off": logits}
    (strict,) = pairs_of(found)
    assert not strict.passed
    near, far = 0.6 * strict.kl, 0.4 * strict.kl
    assert pairs_of(found, {"a-on": near, "a-off": near})[0].passed
    assert not pairs_of(found, {"a-on": near, "a-off": far})[0].passed
    assert not pairs_of(found, {"a-on": near})[0].passed


def test_prompts_are_what_every_engine_takes() -> None:
    tokens = np.arange(5 * 24).reshape(5, 24)
    short, long = EngineLimits(4, 3, 24, 200), EngineLimits(4, 64, 144, 200)
    assert scenario_of(tokens, [long]).prompt_lengths == (6, 5, 4, 3, 6)
    assert scenario_of(tokens, [short, long]).prompt_lengths == (3, 2, 1, 1, 3)
    assert all(int(row[-1]) <= 24 for row in scenario_of(tokens, [short]).predicted_positions() + 1)
    with pytest.raises(UserError, match="--length 24: an engine's --max_seq_len is 20"):
        scenario_of(tokens, [long, EngineLimits(4, 3, 20, 200)])


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (("ep2",), (), "has 2 ranks"),
        (("one", "one"), (), "another engine is called one"),
        (("one",), ("--length", "129"), "--max_seq_len is 128"),
        (("one",), ("--windows", "0"), "at least one window"),
        ((), ("no-such-engine",), "not found"),
        (("one",), ("--text", "no-such-text"), "no-such-text"),
        (("one",), ("--text", str(TINY_MIXTRAL / "config.json"), "--length", "3000"), "fewer than one window"),
    ],
)
def test_what_cannot_be_compared(
    names: tuple[str, ...],
    more: tuple[str, ...],
    message: str,
    engines: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(
            [
                str(tmp_path / "rows.json"),
                *(str(engines(name)) for name in names),
                *more,
                "--model_dir",
                str(TINY_MIXTRAL),
            ]
        )
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
