"""What quantized engines lose, and what plugins change: logits over held-out text, against Hugging Face's in float32.

    python -m moecompiler.tools.bench_quantized_engines ROWS.json ENGINE_DIR... --model_dir DIR [--windows 8] [--length 96]

Engines are of one rank, of any backend, and of the model of ``--model_dir``. Of each window of the text beside it a quarter, if
the engines take that much, is a prompt, and the rest is fed token by token. Directories called NAME-on and NAME-off are one
quantization with plugins and without: their distributions are compared with each other too. Ends with status 1 where these are
``APART`` or more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moecompiler.artifact import Artifact
from moecompiler.atomic import write_json_atomic
from moecompiler.backends.base import EngineLimits
from moecompiler.backends.tensorrt_record import Record
from moecompiler.checkpoint import open_checkpoint
from moecompiler.errors import UserError
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.schemes import FP8
from moecompiler.runtime.session import closing
from moecompiler.runtime.threads import run_in_threads
from moecompiler.tools.job import Job
from moecompiler.tools.run import load_rank
from moecompiler.tools.text import encode_text
from moecompiler.validation.difference import kl_divergence, log_softmax
from moecompiler.validation.engine_run import engine_logits
from moecompiler.validation.quality import compare, hf_logits, load_hf
from moecompiler.validation.scenario import Scenario
from moecompiler.validation.tolerances import TOLERANCES

APART = 1e-3
"""Nats a token, from which on engines with plugins and without are not the same, unless activations are rounded to codes."""
ROUNDED_APART = 2.0
"""Times the divergence from HF of the nearer of both, where activations are rounded to codes: what differs by a last bit rounds
to another code now and then, by a step that is a hundred times as large, and after a few products the two roundings are
independent (docs/quantization.md)."""


@dataclass(frozen=True)
class Row:
    """``plugins``: how many nodes are; None where the backend has none. ``tokens`` predicted. ``increase`` is of the perplexity,
    relative to HF's; ``kl`` the mean divergence from HF's distribution in nats, ``top1`` the share of HF's most likely tokens."""

    engine: str
    format: str
    dtype: str
    backend: str
    plugins: int | None
    tokens: int
    perplexity: float
    hf_perplexity: float
    increase: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Pair:
    """Engines that differ in plugins only: the mean divergence of the one with from the one without, in nats a token, and the
    share of the same most likely tokens."""

    name: str
    kl: float
    top1: float
    bound: float
    passed: bool


def rounds_activations(plan: QuantizationRecipe | None) -> bool:
    """Whether products get codes of their inputs."""
    return plan is not None and any(rule.scheme == FP8 for rule in plan.rules)


def format_of(plan: QuantizationRecipe | None) -> str:
    """Of weights and cache, as the manifest says."""
    rules = () if plan is None else plan.rules
    schemes = dict.fromkeys(str(rule.scheme) for rule in rules if rule.scheme is not None)
    cache = [f"cache {plan.cache.format.value}"] if plan is not None and plan.cache is not None else []
    return ", ".join([*schemes, *cache]) or "none"


def plugins_of(artifact: Artifact) -> int | None:
    """How many nodes of the engine are plugins; None where the backend has none."""
    if artifact.header["backend"] != "tensorrt":
        return None
    return len(Record.load(artifact.path("rank0.engine.json")).plugins)


def open_engines(directories: Sequence[Path], vocab_size: int) -> dict[str, Artifact]:
    """By their directories' names. Raises: UserError where one is of several ranks or another model, or two have one name."""
    result: dict[str, Artifact] = {}
    for directory in directories:
        artifact = Artifact.open(directory, ("engine",))
        if artifact.world_size != 1:
            raise UserError(f"{directory}: has {artifact.world_size} ranks; give engines of one rank")
        if (found := Job.of(artifact).model.vocab_size) != vocab_size:
            raise UserError(f"{directory}: is of a model with {found} tokens, and --model_dir of one with {vocab_size}")
        if (name := directory.absolute().name) in result:
            raise UserError(f"{directory}: another engine is called {name} too; rename one")
        result[name] = artifact
    return result


def cut(token_ids: Sequence[int], windows: int, length: int) -> np.ndarray:
    """The text's first tokens, int64 ``[windows, length]``; fewer if it ends before. Raises: UserError where it has none."""
    if not (count := min(windows, len(token_ids) // length)):
        raise UserError(f"the text has {len(token_ids)} tokens, fewer than one window of --length {length}")
    return np.array(token_ids[: count * length], np.int64).reshape(count, length)


def scenario_of(tokens: np.ndarray, limits: Sequence[EngineLimits]) -> Scenario:
    """``tokens [windows, length]`` with prompts of a few lengths, as all of the engines can take them.

    Raises: UserError where a window is too long for one."""
    windows, length = tokens.shape
    if (slots := min(each.max_seq_len for each in limits)) < length:
        raise UserError(f"--length {length}: an engine's --max_seq_len is {slots}; give at most that")
    prompt = max(1, min(length // 4, *(each.max_input_len for each in limits)))
    ragged = tuple(max(1, prompt - row % 4) for row in range(windows))
    return Scenario("text", tokens, ragged, length - prompt)


def logits_of(artifact: Artifact, scenario: Scenario) -> np.ndarray:
    """``[windows, steps, vocab]`` float32, of as many windows at once as the engine takes."""
    mapping, size = Job.of(artifact).mapping, artifact.header["limits"]["max_batch_size"]

    def run(communicator: Any) -> np.ndarray:
        parts = []
        with closing(load_rank(artifact, communicator.rank, 1, True)) as session:
            for first in range(0, len(scenario.tokens), size):
                rows = slice(first, first + size)
                batch = replace(scenario, tokens=scenario.tokens[rows], prompt_lengths=scenario.prompt_lengths[rows])
                parts.append(engine_logits(session, mapping, batch, communicator))
        return np.concatenate([part for part in parts if part is not None])

    return run_in_threads(1, run)[0]


def row_of(name: str, artifact: Artifact, logits: np.ndarray, exact: np.ndarray, scenario: Scenario) -> Row:
    """``logits`` and HF's ``exact``: ``[windows, steps, vocab]``."""
    job = Job.of(artifact)
    found = compare(logits, exact, scenario, TOLERANCES[job.export.dtype])
    return Row(
        name,
        format_of(job.quantization),
        job.export.dtype,
        artifact.header["backend"],
        plugins_of(artifact),
        found.tokens,
        found.perplexity,
        found.hf_perplexity,
        found.perplexity / found.hf_perplexity - 1,
        found.kl,
        found.top1,
    )


def pairs_of(logits: Mapping[str, np.ndarray], rounded: Mapping[str, float] | None = None) -> list[Pair]:
    """Of engines called NAME-on and NAME-off, from their logits ``[windows, steps, vocab]``; not a number is not near.
    ``rounded``: of those that round activations, the divergence from HF."""
    pairs = []
    for name in logits:
        base = name.removesuffix("-on")
        if base == name or f"{base}-off" not in logits:
            continue
        ours, theirs = logits[name], logits[f"{base}-off"]
        on, off = log_softmax(ours), log_softmax(theirs)
        kl = float(kl_divergence(off, on).mean())
        same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
        divergences = [(rounded or {}).get(each, 0.0) for each in (name, f"{base}-off")]
        bound = max(APART, ROUNDED_APART * min(divergences))
        pairs.append(Pair(base, kl, same, bound, kl < bound))
    return pairs


def table(rows: Sequence[Row]) -> str:
    lines = ["| engine | format | plugins | perplexity | more | KL | top-1 |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        plugins = "" if row.plugins is None else row.plugins
        lines.append(
            f"| {row.engine} | {row.format} | {plugins} | {row.perplexity:.4f} | {100 * row.increase:+.2f}% | {row.kl:.1e} |"
            f" {100 * row.top1:.1f}% |"
        )
    return "\n".join(lines)


def measure(
    directories: Sequence[Path], model_dir: Path, text: Path | None, windows: int, length: int
) -> tuple[list[Row], list[Pair]]:
    """Raises: UserError where an engine cannot be run, or there is not enough text."""
    from moecompiler.config import load_config

    if windows < 1 or length < 4:
        raise UserError(f"--windows {windows} --length {length}: give at least one window of 4 tokens")
    config = load_config(model_dir)
    source = open_checkpoint(model_dir, config)
    artifacts = open_engines(directories, config.vocab_size)
    tokens = cut(encode_text(next(iter(artifacts.values())), text, model_dir, []), windows, length)
    scenario = scenario_of(tokens, [EngineLimits(**each.header["limits"]) for each in artifacts.values()])
    logits = {name: logits_of(artifact, scenario) for name, artifact in artifacts.items()}
    exact = hf_logits(load_hf(config, source.identity(), source), scenario)
    rows = [row_of(name, artifact, logits[name], exact, scenario) for name, artifact in artifacts.items()]
    rounded = {row.engine: row.kl for row in rows if rounds_activations(Job.of(artifacts[row.engine]).quantization)}
    return rows, pairs_of(logits, rounded)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of all rows and pairs")
    parser.add_argument("engine_dirs", type=Path, nargs="+")
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="held-out text (default: heldout.txt beside the checkpoint)")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=96, help="tokens of a window")
    options = parser.parse_args(arguments)
    try:
        rows, pairs = measure(options.engine_dirs, options.model_dir, options.text, options.windows, options.length)
    except UserError as error:
        parser.error(str(error))
    print(table(rows))
    for pair in pairs:
        verdict = "the same" if pair.passed else "NOT THE SAME"
        print(
            f"{pair.name}: KL {pair.kl:.1e} (< {pair.bound:.1e}), top-1 {100 * pair.top1:.1f}% of plugins against none: {verdict}"
        )
    write_json_atomic(
        options.output, {"rows": [asdict(row) for row in rows], "pairs": [asdict(pair) for pair in pairs]}
    )
    return int(not all(pair.passed for pair in pairs))


if __name__ == "__main__":
    sys.exit(main())
