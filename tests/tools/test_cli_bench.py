"""`moecompiler bench` on ONNX Runtime's engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Here

Engines = Callable[[str], Path]
FAST = ("--runs", "2", "--warmup", "0", "--no_check_hashes")


def test_figures(here: Here, engines: Engines, tmp_path: Path) -> None:
    """Every case has its line; the JSON on stdout and in the file are the same, and the figures fit one another."""
    file = tmp_path / "bench.json"
    sizes = ("--batch_size", "1,3", "--input_len", "5", "--output_len", "4,8")
    said = here("bench", "--engine_dir", engines("one"), *sizes, *FAST, "--json", "--output_json", file)
    assert said.status == 0, said.err
    data = json.loads(said.out)
    assert json.loads(file.read_text()) == data
    assert (data["backend"], data["dtype"]) == ("onnxruntime", "float32")
    figures = data["figures"]
    cases = [(each["batch_size"], each["input_len"], each["output_len"]) for each in figures]
    assert cases == [(1, 5, 4), (1, 5, 8), (3, 5, 4), (3, 5, 8)]
    for each in figures:
        assert 0 < each["step_s"] <= each["step_p90_s"] * 1.5
        assert each["time_to_first_token_s"] > 0
        assert each["decode_tokens_per_s"] == pytest.approx(each["batch_size"] / each["step_s"])
        assert each["total_tokens_per_s"] > 0


def test_table_of_several_ranks(here: Here, engines: Engines) -> None:
    said = here("bench", "--engine_dir", engines("ep2"), "--in_process", "--output_len", "1", "--input_len", "7", *FAST)
    assert said.status == 0, said.err
    header, row = [line for line in said.out.splitlines() if "first" in line or "│ 1 " in line]
    assert [cell.strip() for cell in row.split("│")][1:4] == ["1", "7", "1"]
    assert "step, ms" in header
    assert "collectives: host (threads of one process, on the CPU); ranks 0,1" in said.out
    assert "0.000" in row  # with one token there are no steps after the first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch_size", "4"), "--batch_size 4: the engine's max_batch_size is 3; compile with a larger"),
        (("--input_len", "65"), "has 65 tokens, more than the engine's max_input_len 64"),
        (("--input_len", "64", "--output_len", "65"), "more than the engine's max_seq_len 128"),
        (("--batch_size", "1,x"), "--batch_size '1,x': give whole numbers above 0, joined by commas"),
        (("--output_len", "0"), "--output_len '0': give whole numbers above 0"),
        (("--micro_batches", "0"), "--micro_batches"),
        (("--output_json", "/nowhere/x.json", "--output_len", "1", "--input_len", "1", *FAST), "cannot be written"),
    ],
)
def test_refused(arguments: tuple[str, ...], message: str, here: Here, engines: Engines) -> None:
    said = here("bench", "--engine_dir", engines("one"), *arguments)
    assert said.status == 2
    (line,) = said.complaints
    assert message in line


def test_ways_that_the_cpu_has_not(here: Here, engines: Engines) -> None:
    said = here("bench", "--engine_dir", engines("ep2"), "--in_process", "--collectives", "nccl", *FAST)
    assert said.status == 2
    assert "--collectives nccl: these engines run on the CPU; leave it out" in said.complaints[0]


def test_two_ranks_need_two(here: Here, engines: Engines) -> None:
    said = here("bench", "--engine_dir", engines("ep2"))
    assert said.status == 2
    assert (
        "was compiled for 2 rank(s), but 1 run: start it with `mpirun -n 2`, or with --in_process" in said.complaints[0]
    )
