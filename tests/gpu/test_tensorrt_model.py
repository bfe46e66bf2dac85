"""The shipped model as TensorRT engines: greedy text like Hugging Face's, validation, memory that stays flat."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecompiler.artifact import Artifact
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.device import checked, driver
from moecompiler.runtime.generation import GenerationOptions, generate
from moecompiler.runtime.sampling import SamplingOptions
from moecompiler.runtime.session import closing
from moecompiler.runtime.threads import run_in_threads
from moecompiler.tools.job import Job
from moecompiler.tools.main import main
from moecompiler.tools.run import load_rank

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
TINY_MIXTRAL = Path(__file__).parent.parent / "data" / "tiny-mixtral"
LENGTHS, OUTPUT = (5, 12, 23, 31, 40, 47, 58, 64), 64
MAPPINGS = {
    "one": (),
    "tp2": ("--tp_size", "2"),
    "ep2": ("--tp_size", "2", "--moe_ep_size", "2"),
    "pp2": ("--pp_size", "2"),
}
TIE = {"float16": 0.1, "bfloat16": 0.8}  # logits (they span 36) that rounding may put in another order
_KINDS = [
    ("float16", "off", "one"),
    ("float16", "on", "one"),
    ("float16", "on,@layers.1=off", "one"),
    ("bfloat16", "off", "one"),
    ("bfloat16", "on", "one"),
    *(("float16", "on", mapping) for mapping in ("tp2", "ep2", "pp2")),
]
# tests of one kind share its engines, in whatever process they run
KINDS = [pytest.param(*kind, marks=pytest.mark.xdist_group("-".join(kind)), id="-".join(kind)) for kind in _KINDS]
Compile = "functools._lru_cache_wrapper[Path]"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Engine directories by dtype, ``--plugins`` and mapping, each made once."""

    @functools.cache
    def make(dtype: str, plugins: str, mapping: str) -> Path:
        directory = tmp_path_factory.mktemp("engines") / f"{dtype}-{plugins}-{mapping}"
        words = ["compile", "--model_dir", str(TINY_MIXTRAL), "--output_dir", str(directory), "--backend", "tensorrt"]
        limits = ["--max_seq_len", "144", "--max_input_len", "64", "--max_batch_size", "8", "--max_num_tokens", "256"]
        kind = ["--dtype", dtype, "--pipeline", "plugins", "--plugins", plugins, "--moe_weights", "external"]
        assert main([*words, *limits, *kind, *MAPPINGS[mapping]]) == 0
        return directory

    return make


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    text = (TINY_MIXTRAL / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(TINY_MIXTRAL / "tokenizer.json"))
    return [tokenizer.encode(text[7000 * i : 7000 * i + 1000]).ids[:length] for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def hf(prompts: list[list[int]]) -> list[tuple[list[int], np.ndarray]]:
    """Hugging Face's greedy continuation in float32, and the logits of each step, ``[steps, vocab]``."""
    import torch
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(TINY_MIXTRAL, dtype=torch.float32).eval()
    result = []
    for prompt in prompts:
        said = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=OUTPUT,
            min_new_tokens=OUTPUT,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        result.append((said.sequences[0, len(prompt) :].tolist(), torch.cat(said.logits).numpy()))
    return result


@pytest.mark.parametrize(("dtype", "plugins", "mapping"), KINDS)
def test_greedy_text(
    dtype: str,
    plugins: str,
    mapping: str,
    compiled: Compile,
    prompts: list[list[int]],
    hf: list[tuple[list[int], np.ndarray]],
) -> None:
    """As HF's for 64 tokens on 8 prompts, or the first difference is a tie within rounding."""
    artifact = Artifact.open(compiled(dtype, plugins, mapping), ("engine",))

    def run(communicator: Communicator) -> list[list[int]]:
        session = load_rank(artifact, communicator.rank, 1, True)
        return generate(session, communicator, Job.of(artifact).mapping, prompts, GenerationOptions(OUTPUT)).output_ids

    equal = 0
    for mine, (theirs, logits) in zip(run_in_threads(artifact.world_size, run)[0], hf, strict=True):
        different = [step for step, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
        if different:
            step = different[0]
            gap = logits[step][theirs[step]] - logits[step][mine[step]]
            assert gap < TIE[dtype], f"step {step}: HF prefers its token by {gap:.3f}"
        equal += not different
    assert equal >= len(prompts) // 2


class OnHost:
    """A session of which only logits are wanted."""

    can_sample = False

    def __init__(self, session: Any):
        self.session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


@pytest.mark.parametrize(("dtype", "plugins", "mapping"), KINDS)
def test_tokens_chosen_on_the_gpu(
    dtype: str, plugins: str, mapping: str, compiled: Compile, prompts: list[list[int]]
) -> None:
    """Are those that numpy chooses from the same engine's logits, greedy and drawn, to a sequence's end."""
    artifact = Artifact.open(compiled(dtype, plugins, mapping), ("engine",))
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


@pytest.mark.parametrize(("dtype", "plugins", "mapping"), KINDS)
def test_validate(dtype: str, plugins: str, mapping: str, compiled: Compile) -> None:
    assert main(["validate", str(compiled(dtype, plugins, mapping)), "--tokens", "512"]) == 0


@pytest.mark.xdist_group("float16-on-one")
def test_memory_stays_flat(compiled: Compile) -> None:
    """Batches and lengths alternate; after each has been seen once, the GPU's free memory does not change."""
    artifact = Artifact.open(compiled("float16", "on", "one"), ("engine",))
    rng = np.random.default_rng(0)

    def run(communicator: Communicator) -> list[int]:
        session, free = load_rank(artifact, 0, 1, False), []
        for turn in range(60):
            batch, length = turn % 8 + 1, (7 * turn) % 60 + 2
            given = rng.integers(0, 1536, (batch, length)).tolist()
            generate(session, communicator, Job.of(artifact).mapping, given, GenerationOptions(4))
            free.append(checked(driver().cuMemGetInfo())[0])
        return free

    (free,) = run_in_threads(1, run)
    assert len(set(free[16:])) == 1, free
