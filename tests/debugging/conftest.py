"""Exports of the shipped model that tests of passes look into."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from planted import MakeSubject
from programs import GRID, TINY_MIXTRAL, Programs, Subject

from moecompiler.backends.base import EngineLimits
from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import ExportOptions
from moecompiler.debugging.subject import ExportedRanks
from moecompiler.graph import serialize
from moecompiler.validation.place import RankPlace
from moecompiler.validation.scenario import random_scenario

SLOTS = 40


@pytest.fixture(scope="session")
def subject_of(programs: Programs, shipped: Subject, tmp_path_factory: pytest.TempPathFactory) -> MakeSubject:
    """Mapping's name and dtype → the ranks of an export, or of what ``ootb`` makes of it (``tidy``: most passes' time goes into
    that), in files, with a short run of random tokens. Made once for each."""

    @functools.cache
    def make(mapping: str, dtype: str = "float32", tidy: bool = True) -> ExportedRanks:
        options = ExportOptions(dtype, max_seq_len=SLOTS)
        directory: Path = tmp_path_factory.mktemp(f"{mapping}-{dtype}")
        places = tuple(
            RankPlace(shipped.config, GRID[mapping], options, rank) for rank in range(GRID[mapping].world_size)
        )
        for place in places:
            get = programs.optimized if tidy else programs.exported
            program = get(shipped.config, place.mapping, place.rank, options)
            graph, recipes = serialize(program, f"rank{place.rank}")
            (directory / f"rank{place.rank}.onnx").write_bytes(graph)
            (directory / f"rank{place.rank}.weights.json").write_bytes(recipes)
        source = open_checkpoint(TINY_MIXTRAL, shipped.config)
        limits = EngineLimits(3, SLOTS - 1, SLOTS, shipped.config.vocab_size)
        return ExportedRanks(directory, places, source.identity(), source, (random_scenario(limits),), limits)

    return make
