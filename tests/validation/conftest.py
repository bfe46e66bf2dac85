"""Engines of the shipped model that the validation tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import ExportOptions, load_config
from moecompiler.mapping import Mapping
from moecompiler.tools.build import EngineOptions
from moecompiler.tools.compile import run_compile
from moecompiler.tools.job import make_job

SHIPPED = Path(__file__).parents[1] / "data" / "tiny-mixtral"


def compile_shipped(directory: Path, mapping: Mapping, dtype: str = "float32") -> Path:
    config = load_config(SHIPPED)
    source = open_checkpoint(SHIPPED, config).identity()
    run_compile(make_job(config, source, mapping, ExportOptions(dtype, max_seq_len=96)), directory, EngineOptions())
    return directory


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensor-parallel attention, expert-parallel experts, float32."""
    return compile_shipped(tmp_path_factory.mktemp("engines") / "ep2", Mapping.create(2, 1, None, 2))


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shipped(tmp_path_factory.mktemp("engines") / "one", Mapping.create())


@pytest.fixture(scope="session")
def two_ranks_float16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shipped(tmp_path_factory.mktemp("engines") / "half", Mapping.create(2, 1, None, 2), "float16")
