"""What tests of programs share: models, mappings, one export of each stage for all tests, and ranks run in lockstep."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from checkpoints import published_weights, random_model, tiny_config
from readers import ArrayReader
from tokenizers import Tokenizer

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.onnxruntime import OnnxRuntimeBackend
from moecompiler.checkpoint import open_checkpoint
from moecompiler.config import ExportOptions, ModelConfig, load_config, parse_config
from moecompiler.export import export_rank, with_recipes
from moecompiler.graph import Program
from moecompiler.mapping import Mapping
from moecompiler.model import Cache, RankModule
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.reference import empty_caches, load_rank_module, to_numpy
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.session import StageSession
from moecompiler.runtime.threads import run_in_threads
from moecompiler.weights import TensorReader

TINY_MIXTRAL = Path(__file__).parent / "data" / "tiny-mixtral"
MAX_SEQ_LEN = 40
DECODE_STEPS = 16

GRID = {
    "one-rank": Mapping.create(),
    "tp2": Mapping.create(2),
    "tp4": Mapping.create(4),
    "ep2": Mapping.create(2, moe_ep_size=2),
    "ep4": Mapping.create(4, moe_ep_size=4),
    "ep8": Mapping.create(8, moe_ep_size=8),
    "tp2-ep2": Mapping.create(4, moe_tp_size=2, moe_ep_size=2),
    "pp2": Mapping.create(pp_size=2),
    "pp4": Mapping.create(pp_size=4),
    "tp2-pp2": Mapping.create(2, 2),
    "ep2-pp2": Mapping.create(2, 2, moe_ep_size=2),
}


@dataclass(frozen=True)
class Subject:
    """A model three times: our configuration, its weights, and transformers' float32 module of it."""

    config: ModelConfig
    reader: TensorReader
    hf: transformers.MixtralForCausalLM


def shipped_subject() -> Subject:
    """The trained model in ``tests/data``; its weights are bfloat16."""
    config = load_config(TINY_MIXTRAL)
    hf = transformers.MixtralForCausalLM.from_pretrained(TINY_MIXTRAL, dtype=torch.float32)
    return Subject(config, open_checkpoint(TINY_MIXTRAL, config), hf.eval())


def random_subject(**overrides: Any) -> Subject:
    """A random model of ``checkpoints.tiny_config``."""
    content = tiny_config(**overrides)
    hf = random_model(content)
    return Subject(parse_config(content, "random"), ArrayReader(published_weights(hf)), hf)


@dataclass(frozen=True)
class Passage:
    """``tokens [batch, length]`` int64; of row i the first ``prompt_lengths[i]`` are prefilled, the next ``decode_steps`` fed
    one at a time, whatever the model would have said."""

    tokens: np.ndarray
    prompt_lengths: tuple[int, ...]
    decode_steps: int = DECODE_STEPS

    def steps(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The arguments of ``StageSession.step``. Behind a prompt stand tokens that are not those to come."""
        batch, lengths = len(self.tokens), np.array(self.prompt_lengths, np.int64)
        columns = np.arange(lengths.max(), dtype=np.int64)
        prompts = np.where(columns < lengths[:, None], self.tokens[:, : len(columns)], self.tokens[0, 0])
        result = [(prompts, np.tile(columns, (batch, 1)), lengths - 1)]
        for step in range(self.decode_steps):
            at = (lengths + step)[:, None]
            result.append((np.take_along_axis(self.tokens, at, axis=1), at, np.zeros_like(lengths)))
        return result


def text_passage() -> Passage:
    """Three pieces of the held-out text, of unequal prompts."""
    tokenizer = Tokenizer.from_file(str(TINY_MIXTRAL / "tokenizer.json"))
    text = (TINY_MIXTRAL / "heldout.txt").read_text(encoding="utf-8")
    rows = [tokenizer.encode(text[start : start + 1000]).ids[: MAX_SEQ_LEN - 2] for start in (0, 20_000, 50_000)]
    return Passage(np.array(rows, np.int64), (12, 5, 22))


def random_passage(
    vocab_size: int, prompt_lengths: tuple[int, ...] = (12, 5, 9), decode_steps: int = DECODE_STEPS
) -> Passage:
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, vocab_size, (len(prompt_lengths), max(prompt_lengths) + decode_steps))
    return Passage(tokens, prompt_lengths, decode_steps)


def hf_logits(model: transformers.MixtralForCausalLM, passage: Passage) -> np.ndarray:
    """What transformers says at every step, ``[batch, steps, vocab]``, from whole rows at once, without a KV cache."""
    with torch.no_grad():
        logits = model(torch.from_numpy(passage.tokens), use_cache=False).logits.float().numpy()
    lengths = np.array(passage.prompt_lengths)
    at = lengths[:, None] - 1 + np.arange(passage.decode_steps + 1)
    return np.take_along_axis(logits, at[..., None], axis=1)


class TorchSession:
    """A rank module behind the interface of an engine; ``make_caches``: batch → empty caches."""

    def __init__(self, module: RankModule, make_caches: Callable[[int], list[Cache]]):
        self.module, self.make_caches = module, make_caches
        self.dtype = next(module.parameters()).dtype

    def start(self, batch: int) -> None:
        self.caches = [(key.to(self.dtype), value.to(self.dtype)) for key, value in self.make_caches(batch)]

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(x)
        tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        with torch.inference_mode():
            y, self.caches = self.module(
                tensor, torch.from_numpy(position_ids), torch.from_numpy(last_token_ids), self.caches
            )
        return to_numpy(y)


def torch_sessions(
    subject: Subject, mapping: Mapping, options: ExportOptions, compute_dtype: str | None = None
) -> list[TorchSession]:
    """Every rank's module; see ``load_rank_module`` for ``compute_dtype``."""
    return [
        TorchSession(
            load_rank_module(subject.config, mapping, rank, options, subject.reader, compute_dtype),
            partial(empty_caches, subject.config, mapping, rank, options),
        )
        for rank in range(mapping.world_size)
    ]


def run_ranks(sessions: Sequence[StageSession | TorchSession], mapping: Mapping, passage: Passage) -> np.ndarray:
    """Runs all ranks through a passage, as generation does: logits ``[batch, steps, vocab]``, which must have the same bits on
    every rank of the last stage."""

    def run(communicator: Communicator) -> np.ndarray | None:
        rank = communicator.rank
        sessions[rank].start(len(passage.tokens))
        logits = []
        for input_ids, position_ids, last_token_ids in passage.steps():
            x = input_ids if mapping.is_first_stage(rank) else communicator.receive(rank - mapping.tp_size)
            y = sessions[rank].step(x, position_ids, last_token_ids)
            if mapping.is_last_stage(rank):
                logits.append(y)
            else:
                communicator.send(y, rank + mapping.tp_size)
        return np.stack(logits, axis=1) if logits else None

    first, *others = [logits for logits in run_in_threads(mapping.world_size, run) if logits is not None]
    for other in others:
        np.testing.assert_array_equal(other, first)
    return first


def largest_error(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    return float(np.abs(got.astype(np.float64) - wanted).max())


class Programs:
    """Exports each stage once and keeps it in ``directory``, which all processes of a test run share."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._programs: dict[tuple[Any, ...], Program] = {}

    def exported(self, config: ModelConfig, mapping: Mapping, rank: int, options: ExportOptions) -> Program:
        """The program as ``export_rank`` makes it; those of one stage's ranks differ by recipes alone."""
        stage = mapping.tp_group(rank)[0]
        key = hashlib.sha256(repr((config, mapping, stage, options)).encode()).hexdigest()
        path = self.directory / f"{key}.onnx"
        with self._locked(key):
            if not path.exists():
                program = export_rank(config, mapping, stage, options)
                path.write_bytes(program.model.SerializeToString(deterministic=True))
        return with_recipes(onnx.load(path, load_external_data=False), config, mapping, rank, options)

    def optimized(self, config: ModelConfig, mapping: Mapping, rank: int, options: ExportOptions) -> Program:
        """The program after the ``optimize`` pipeline."""
        key = (config, mapping, rank, options)
        if key not in self._programs:
            self._programs[key] = run_passes(named_pipelines()["ootb"], self.exported(*key))[0]
        return self._programs[key]

    def engines(
        self, subject: Subject, mapping: Mapping, options: ExportOptions, directory: Path
    ) -> list[StageSession]:
        """Every rank's engine, built in ``directory`` from its optimized program, and loaded."""
        programs = [self.optimized(subject.config, mapping, rank, options) for rank in range(mapping.world_size)]
        return build_and_load(programs, subject, directory)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with (self.directory / f"{key}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def build_and_load(programs: Sequence[Program], subject: Subject, directory: Path) -> list[StageSession]:
    """ONNX Runtime's engines of the given programs, one for each rank."""
    backend = OnnxRuntimeBackend()
    limits = EngineLimits(3, MAX_SEQ_LEN, MAX_SEQ_LEN, subject.config.vocab_size)
    for rank, program in enumerate(programs):
        built = backend.build(
            program, subject.reader, f"rank{rank}", directory, BuildSettings(limits), lambda fraction: None
        )
        for name, temporary in built.items():
            os.replace(temporary, directory / name)
    return [backend.load(directory, f"rank{rank}", limits, threads=1) for rank in range(len(programs))]
