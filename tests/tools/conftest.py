"""Fixtures of the command line's tests: engines are compiled once in a test run, whatever its processes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import ENDLESS_TOKENS, ONE_RANK, TINY_MIXTRAL, TWO_RANKS, Here

from moecompiler.tools.main import main

# name → options of a compile; "endless" has no end-of-text token, so that it can be disturbed while it generates
ENGINES: dict[str, tuple[str, ...]] = {
    "one": ONE_RANK,
    "ep2": TWO_RANKS,
    "tp2-pp2": (*ONE_RANK, "--tp_size", "2", "--pp_size", "2"),
    "endless": ("--dtype", "float32", "--max_seq_len", str(ENDLESS_TOKENS + 8), "--tp_size", "2"),
}
ENDLESS_CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": ENDLESS_TOKENS + 8,
    "eos_token_id": None,
}


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def engines(shared_directory: Path) -> Callable[[str], Path]:
    """The directory of the engines of that name, see ``ENGINES``; not to be written to."""

    def compiled(name: str) -> Path:
        directory = shared_directory / "engines" / name
        directory.parent.mkdir(exist_ok=True)
        with directory.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / "manifest.json").exists():
                source = ("--model_dir", str(TINY_MIXTRAL))
                if name == "endless":
                    config = directory.with_suffix(".json")
                    config.write_text(json.dumps(ENDLESS_CONFIG))
                    source = ("--model", str(config))
                assert main(["compile", *source, "--output_dir", str(directory), *ENGINES[name]]) == 0
        return directory

    return compiled
