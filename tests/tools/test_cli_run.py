"""``run``: the same result however the ranks are run, prompts in each form, files out, choices that can be repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import PROMPT, TINY_MIXTRAL, Here, Output, under_mpi
from tokenizers import Tokenizer

Engines = Callable[[str], Path]
# more than a batch of 3, of unequal lengths
PROMPTS = (PROMPT, "import os", "class Stack:  # a list from which the last item is taken first", "x")
NEW_TOKENS = 12
RANKS = {"ep2": 2, "tp2-pp2": 4}
FILES = ("ids.npy", "ids.csv", "logits.npy")
pytestmark = pytest.mark.xdist_group("run")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(TINY_MIXTRAL / "tokenizer.json"))


def words(engine_dir: Path, *more: object) -> tuple[object, ...]:
    """A run of one thread a rank, so that the order of additions, and every bit, is the same."""
    return ("run", "--engine_dir", engine_dir, "--max_output_len", NEW_TOKENS, "--threads", 1, *more)


def files(folder: Path) -> tuple[object, ...]:
    folder.mkdir()
    names = ("--output_npy", "--output_csv", "--output_logits_npy")
    return tuple(word for name, file in zip(names, FILES, strict=True) for word in (name, folder / file))


def read_ids(path: Path) -> list[list[int]]:
    return [[int(cell) for cell in line.split(",")] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def batch_of_one_rank(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[int]], np.ndarray]:
    """Token ids and logits of ``PROMPTS`` by the engine of one rank."""
    from moecompiler.tools.main import main

    folder = tmp_path_factory.mktemp("one") / "files"
    command = words(engines("one"), *files(folder), "--input_text", *PROMPTS)
    assert main([str(word) for word in command]) == 0
    return read_ids(folder / "ids.csv"), np.load(folder / "logits.npy")


@pytest.mark.mpi
@pytest.mark.parametrize("name", RANKS)
def test_processes_threads_and_one_rank_agree(
    name: str,
    engines: Engines,
    here: Here,
    tmp_path: Path,
    batch_of_one_rank: tuple[list[list[int]], np.ndarray],
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    as_processes = under_mpi(RANKS[name], *words(engines(name), *files(tmp_path / "mpi"), "--input_file", prompts))
    assert as_processes.status == 0, as_processes.err
    as_threads = here(*words(engines(name), *files(tmp_path / "threads"), "--input_text", *PROMPTS, "--in_process"))
    assert as_threads.status == 0, as_threads.err

    assert as_processes.out == as_threads.out
    for file in FILES:
        assert (tmp_path / "mpi" / file).read_bytes() == (tmp_path / "threads" / file).read_bytes()
    ids, logits = batch_of_one_rank
    assert read_ids(tmp_path / "mpi" / "ids.csv") == ids
    got = np.load(tmp_path / "mpi" / "logits.npy")
    assert (got.dtype, got.shape) == (np.float32, logits.shape)
    np.testing.assert_allclose(got, logits, atol=2e-4, rtol=0)


def test_micro_batches(
    engines: Engines, here: Here, tmp_path: Path, batch_of_one_rank: tuple[list[list[int]], np.ndarray]
) -> None:
    """Undivided, and one by one: what one rank says. It is said which way what goes."""
    for count in (1, 3):
        folder = tmp_path / str(count)
        more = ("--input_text", *PROMPTS, "--in_process", "--micro_batches", count, "-v")
        said = here(*words(engines("tp2-pp2"), *files(folder), *more))
        assert said.status == 0, said.err
        assert read_ids(folder / "ids.csv") == batch_of_one_rank[0]
        np.testing.assert_allclose(np.load(folder / "logits.npy"), batch_of_one_rank[1], atol=2e-4, rtol=0)
        assert "note: from stage to stage: host (threads of one process, on the CPU); ranks 0,2 1,3" in said.err


def test_what_the_files_hold(
    engines: Engines, tokenizer: Any, batch_of_one_rank: tuple[list[list[int]], np.ndarray]
) -> None:
    ids, logits = batch_of_one_rank
    assert logits.shape == (len(PROMPTS), NEW_TOKENS, tokenizer.get_vocab_size())
    for text, row, steps in zip(PROMPTS, ids, logits, strict=True):
        prompt = tokenizer.encode(text).ids
        output = row[len(prompt) :]
        assert row[: len(prompt)] == prompt
        assert 1 <= len(output) <= NEW_TOKENS
        assert output == steps.argmax(-1)[: len(output)].tolist()
        assert not steps[len(output) :].any()


@pytest.mark.mpi
def test_one_prompt_is_printed_with_what_follows(engines: Engines, tokenizer: Any, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    command = words(engines("ep2"), *files(tmp_path / "out"), "--summary_json", summary, "--input_text", PROMPT)
    output = under_mpi(2, *command)
    assert output.status == 0
    (ids,) = read_ids(tmp_path / "out" / "ids.csv")
    assert output.out == tokenizer.decode(ids) + "\n"
    (line,) = output.own_lines
    figures = json.loads(summary.read_text())
    assert line.startswith(f"1 prompt(s), {figures['output_tokens']} tokens: first token after ")
    assert figures["output_tokens"] == len(ids) - len(tokenizer.encode(PROMPT).ids)
    assert figures["time_to_first_token_s"] > 0
    assert figures["decode_tokens_per_s"] > 0


def run_one(here: Here, engines: Engines, *more: object) -> Output:
    """By the engine of one rank, without MPI."""
    output = here(*words(engines("one"), *more))
    assert output.status == 0, output.err
    return output


def test_prompts_as_token_ids(
    engines: Engines,
    here: Here,
    tokenizer: Any,
    tmp_path: Path,
    batch_of_one_rank: tuple[list[list[int]], np.ndarray],
) -> None:
    ids = [tokenizer.encode(text).ids for text in PROMPTS]
    (tmp_path / "prompts.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in ids))
    padded = np.full((len(ids), max(map(len, ids))), -1)
    for row, prompt in zip(padded, ids, strict=True):
        row[: len(prompt)] = prompt
    np.save(tmp_path / "prompts.npy", padded)
    for form in ("csv", "npy"):
        output = run_one(here, engines, *files(tmp_path / form), "--input_file", tmp_path / f"prompts.{form}")
        assert read_ids(tmp_path / form / "ids.csv") == batch_of_one_rank[0]
        assert output.out.startswith("--- prompt 0 ---\n")


def test_files_written_by_a_run_are_prompts_again(engines: Engines, here: Here, tmp_path: Path) -> None:
    run_one(here, engines, *files(tmp_path / "first"), "--input_text", *PROMPTS)
    for file in ("ids.csv", "ids.npy"):
        run_one(here, engines, *files(tmp_path / file), "--input_file", tmp_path / "first" / file)
        before, after = read_ids(tmp_path / "first" / "ids.csv"), read_ids(tmp_path / file / "ids.csv")
        assert all(new[: len(old)] == old for old, new in zip(before, after, strict=True))


def test_a_prompt_does_not_depend_on_its_company(
    engines: Engines, here: Here, tmp_path: Path, batch_of_one_rank: tuple[list[list[int]], np.ndarray]
) -> None:
    for index, (prompt, ids) in enumerate(zip(PROMPTS, batch_of_one_rank[0], strict=True)):
        run_one(here, engines, *files(tmp_path / str(index)), "--input_text", prompt)
        assert read_ids(tmp_path / str(index) / "ids.csv") == [ids]


def test_choices_can_be_repeated(engines: Engines, here: Here) -> None:
    def text(*more: object) -> str:
        return run_one(here, engines, "--input_text", *PROMPTS, *more).out

    greedy = text()
    sampled = text("--temperature", 1.5, "--seed", 1)
    assert sampled == text("--temperature", 1.5, "--seed", 1) != greedy
    assert sampled != text("--temperature", 1.5, "--seed", 2)
    assert (
        text("--top_k", 20, "--top_p", 0.9, "--seed", 3) == text("--top-k", 20, "--top-p", 0.9, "--seed", 3) != greedy
    )
    assert text("--temperature", 0) == text("--top_k", 1) == greedy
    assert text("--repetition_penalty", 2.5) != greedy
    split = here(*words(engines("ep2"), "--input_text", *PROMPTS, "--temperature", 1.5, "--seed", 1, "--in_process"))
    assert split.out == sampled


def test_a_tokenizer_from_elsewhere(engines: Engines, here: Here) -> None:
    own = run_one(here, engines, "--input_text", PROMPT)
    assert run_one(here, engines, "--input_text", PROMPT, "--tokenizer_dir", TINY_MIXTRAL).out == own.out
