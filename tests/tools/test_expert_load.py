"""Experts apart, and every token on one rank's: the other rank adds nothing, and ``bench`` says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_hf, tiny_config
from cli import TINY_MIXTRAL, Here
from safetensors.numpy import load_file, save_file

from moecompiler.mapping import Mapping
from moecompiler.tools.expert_load import rank_loads

SIZES = ("--dtype", "float32", "--max_seq_len", "32", "--max_batch_size", "2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its routers send every token to two experts of the first half: logits of 4 and 3 times a number, of -4 and -3 times it,
    and 0 for the second half."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_hf(folder, tiny_config(vocab_size=64, num_hidden_layers=2, num_local_experts=8))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    routers = [name for name in tensors if name.endswith("gate.weight")]
    assert len(routers) == 2
    for name in routers:
        factors = np.array([4, 3, -4, -3, 0, 0, 0, 0], np.float32)
        tensors[name] = np.outer(factors, tensors[name][0].astype(np.float32)).astype(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.xdist_group("expert_load")
def test_all_tokens_on_the_experts_of_one_rank(checkpoint: Path, here: Here, tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("1,2,3,4,5\n9,8\n")
    logits = []
    for name, *split in (("one",), ("ep2", "--tp_size", "2", "--moe_ep_size", "2", "--pipeline", "plugins")):
        words = ("--model_dir", checkpoint, "--output_dir", tmp_path / name)
        assert here("compile", *words, *SIZES, *split).status == 0
        files = ("--input_file", tmp_path / "ids.csv", "--output_logits_npy", tmp_path / f"{name}.npy")
        assert here("run", "--engine_dir", tmp_path / name, "--max_output_len", 4, "--in_process", *files).status == 0
        logits.append(np.load(tmp_path / f"{name}.npy"))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)

    sizes = ("--batch_size", "2", "--input_len", "5", "--output_len", "4", "--runs", "1", "--warmup", "0")
    bench = ("bench", "--engine_dir", tmp_path / "ep2", "--in_process", "--expert_load", *sizes)
    (loads,) = json.loads(here(*bench, "--json").out)["expert_load"]
    pairs = 2 * (5 + 3) * 2 * 2  # sequences, tokens of each that are run, layers, experts of a token
    assert [(each["rank"], each["experts"], each["tokens"]) for each in loads] == [(0, [0, 3], pairs), (1, [4, 7], 0)]
    assert [each["imbalance"] for each in loads] == [2.0, 0.0]
    assert sum(loads[0]["per_expert"]) == pairs
    table = here(*bench).out
    assert "imbalance" in table
    assert "0-3" in table


def test_routers_of_plain_operators(here: Here, engines: Callable[[str], Path]) -> None:
    sizes = ("--batch_size", "1", "--input_len", "5", "--output_len", "3", "--runs", "1", "--warmup", "0")
    said = here("bench", "--engine_dir", engines("ep2"), "--in_process", "--expert_load", *sizes, "--json")
    (loads,) = json.loads(said.out)["expert_load"]
    pairs = sum(each["tokens"] for each in loads)
    config = json.loads((TINY_MIXTRAL / "config.json").read_text())
    assert pairs == (5 + 2) * config["num_hidden_layers"] * config["num_experts_per_tok"]
    assert sum(each["imbalance"] for each in loads) == pytest.approx(2.0)


def test_ranks_of_a_hybrid_and_of_stages() -> None:
    first, second = np.array([5, 3, 0, 0]), np.array([1, 1, 1, 1])
    loads = rank_loads([first] * 4 + [second] * 4, Mapping.create(8 // 2, 2, 2, 2))
    assert [each.tokens for each in loads] == [8, 0, 8, 0, 2, 2, 2, 2]
    assert [each.imbalance for each in loads] == [2.0, 0.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert loads[1].experts == (2, 3)
    assert loads[0].per_expert == (5, 3)
