"""The shipped model as TensorRT engines: greedy text like Hugging Face's, validation, memory that stays flat, refusals.

``tools/gpu_check.py`` does most of it too, with the same code, many at once and timed; there ``--engines`` shares what is built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecompiler.artifact import Artifact
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.generation import GenerationOptions, generate
from moecompiler.runtime.sampling import SamplingOptions
from moecompiler.runtime.session import closing
from moecompiler.runtime.threads import run_in_threads
from moecompiler.tools import compare_text, gpu_refusals, gpu_soak
from moecompiler.tools.compare_text import read_prompts
from moecompiler.tools.gpu_kinds import KINDS, TESTED, Kind, compile_shipped
from moecompiler.tools.job import Job
from moecompiler.tools.main import main
from moecompiler.tools.run import load_rank

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
TINY_MIXTRAL = Path(__file__).parent.parent / "data" / "tiny-mixtral"
OUTPUT = 64
# tests of one kind share its engines, in whatever process they run
PARAMETERS = [pytest.param(kind, marks=pytest.mark.xdist_group(kind.name), id=kind.name) for kind in TESTED]
Compile = Callable[[Kind], Path]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Engine directories by kind, each made once: in the folder that ``--engines`` names, or in one that pytest removes."""
    folder = request.config.getoption("--engines", None) or tmp_path_factory.mktemp("engines")

    @functools.cache
    def make(kind: Kind) -> Path:
        directory = Path(folder) / kind.name
        assert main(compile_shipped(kind, TINY_MIXTRAL, directory)) == 0
        return directory

    return make


@pytest.mark.parametrize("kind", PARAMETERS)
def test_greedy_text(kind: Kind, compiled: Compile, tmp_path: Path) -> None:
    """As HF's for 64 tokens on 8 prompts, or the first difference is a tie within rounding."""
    assert compare_text.main([str(tmp_path / "rows.json"), str(compiled(kind)), "--model_dir", str(TINY_MIXTRAL)]) == 0


class OnHost:
    """A session of which only logits are wanted."""

    can_sample = False

    def __init__(self, session: Any):
        self.session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_tokens_chosen_on_the_gpu(kind: Kind, compiled: Compile) -> None:
    """Are those that numpy chooses from the same engine's logits, greedy and drawn, to a sequence's end."""
    artifact = Artifact.open(compiled(kind), ("engine",))
    prompts = read_prompts(Job.of(artifact), TINY_MIXTRAL)
    drawn = SamplingOptions(temperature=0.9, top_k=300, top_p=0.95, seed=5, repetition_penalty=1.2)
    requests = [
        GenerationOptions(OUTPUT, each, Job.of(artifact).model.eos_token_ids) for each in (SamplingOptions(), drawn)
    ]

    def run(communicator: Communicator) -> list[list[list[int]]]:
        last, place = communicator.rank == artifact.world_size - 1, Job.of(artifact).mapping
        with closing(load_rank(artifact, communicator.rank, 1, True)) as session:
            assert session.can_sample or not last
            return [
                generate(each, communicator, place, prompts, options).output_ids
                for options in requests
                for each in (session, OnHost(session))
            ]

    greedy, greedy_host, some, some_host = run_in_threads(artifact.world_size, run)[0]
    assert greedy == greedy_host
    assert some == some_host
    assert greedy != some


@pytest.mark.parametrize("kind", PARAMETERS)
def test_validate(kind: Kind, compiled: Compile) -> None:
    assert main(["validate", str(compiled(kind)), "--tokens", "512"]) == 0


@pytest.mark.xdist_group(KINDS[0].name)
def test_memory_stays_flat(compiled: Compile, tmp_path: Path) -> None:
    """Batches and lengths alternate; after each has been seen once, the GPU's free memory does not change. Where other processes
    use the GPU too, this cannot be told."""
    turns = ("--turns", "700")
    assert gpu_soak.main([str(tmp_path / "rows.json"), str(compiled(KINDS[0])), *turns]) == 0


@pytest.mark.xdist_group(KINDS[0].name)
def test_what_cannot_run_is_refused(compiled: Compile, tmp_path: Path) -> None:
    """Damaged engines, and those of another GPU or TensorRT."""
    assert gpu_refusals.main([str(tmp_path / "rows.json"), str(compiled(KINDS[0]))]) == 0
