"""Engines of the shipped model that the validation tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import ExportOptions, load_config
from moecompiler.mapping import Mapping
from moecompiler.tools.compile import run_compile
from moecompiler.tools.flags import EngineFlags, InstrumentFlags, SelectionFlags, WorkFlags
from moecompiler.tools.job import Job

SHIPPED = Path(__file__).parents[1] / "data" / "tiny-mixtral"


def compile_shipped(directory: Path, mapping: Mapping, dtype: str = "float32") -> Path:
    config = load_config(SHIPPED)
    source = open_checkpoint(SHIPPED, config).identity()
    job = Job(config, mapping, ExportOptions(dtype, max_seq_len=96), source)
    run_compile(job, directory, EngineFlags(), SelectionFlags(), InstrumentFlags(), WorkFlags())
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
