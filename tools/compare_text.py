"""Greedy text of engines against Hugging Face's in float32, token by token.

    python -m moecompiler.tools.compare_text ROWS.json ENGINE_DIR --model_dir DIR [--prompts 8] [--output_len 64]

Up to the first token that differs both models have read the same, so their logits can be compared there: the margin by which
HF prefers its token in float32, against the engine's error. Within ``TIE`` it is rounding that decides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moecompiler.artifact import Artifact
from moecompiler.atomic import write_json_atomic
from moecompiler.errors import UserError
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.generation import Generation, GenerationOptions, generate
from moecompiler.runtime.prompts import load_tokenizer
from moecompiler.runtime.session import closing
from moecompiler.runtime.threads import run_in_threads
from moecompiler.tools.job import Job
from moecompiler.tools.run import load_rank
from moecompiler.tools.text import default_text

LENGTHS = (5, 12, 23, 31, 40, 47, 58, 64)  # tokens of the prompts
_APART = 7000  # characters from one prompt's beginning to the next one's
TIE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.4}
"""Largest margin, in logits, that rounding may turn round, by the engine's dtype: some five times the largest error of the
shipped model's logits in float16 (0.009 in ONNX Runtime, of logits that span 36); bfloat16 rounds eight times as coarsely."""


@dataclass(frozen=True)
class Row:
    """A prompt's outcome. ``equal``: tokens that are HF's, of ``length``. At the first that is not: ``margin``, by how much HF
    prefers its own token to the engine's, in float32; ``error``, the largest error of the engine's logits there, and ``rms``, its
    root mean square over the vocabulary. ``error_before``: the largest at any step before."""

    prompt: int
    prompt_tokens: int
    equal: int
    length: int
    margin: float
    error: float
    rms: float
    error_before: float
    passed: bool


def read_prompts(job: Job, tokenizer_dir: Path, count: int = len(LENGTHS)) -> list[list[int]]:
    """Token ids of the beginnings of parts of the text beside the checkpoint, of ``LENGTHS`` tokens."""
    tokenizer = load_tokenizer(tokenizer_dir, job.model.vocab_size)
    text = default_text(job).read_text(encoding="utf-8")
    return [
        tokenizer.encode(text[_APART * i % len(text) :][:1000])[:length] for i, length in enumerate(LENGTHS[:count])
    ]


def hf_text(model_dir: Path, prompts: Sequence[Sequence[int]], steps: int) -> list[tuple[list[int], np.ndarray]]:
    """Hugging Face's greedy continuation of each prompt in float32, and the logits ``[steps, vocab]`` it is chosen from."""
    import torch
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
    result = []
    for prompt in prompts:
        said = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=steps,
            min_new_tokens=steps,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        result.append((said.sequences[0, len(prompt) :].tolist(), torch.cat(said.logits).numpy()))
    return result


def engine_text(artifact: Artifact, prompts: list[list[int]], steps: int) -> Generation:
    """The engines' greedy continuation, with logits; all ranks as threads of this process."""
    options = GenerationOptions(steps, keep_logits=True)

    def run(communicator: Communicator) -> Generation:
        with closing(load_rank(artifact, communicator.rank, 1, True)) as session:
            return generate(session, communicator, Job.of(artifact).mapping, prompts, options)

    return run_in_threads(artifact.world_size, run)[0]


def compare(
    number: int,
    prompt: Sequence[int],
    mine: tuple[Sequence[int], np.ndarray],
    theirs: tuple[Sequence[int], np.ndarray],
    tie: float,
) -> Row:
    """Both as tokens and the logits ``[steps, vocab]`` that they were chosen from."""
    (tokens, logits), (wanted, exact) = mine, theirs
    different = [step for step, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b]
    equal = different[0] if different else len(wanted)
    errors = logits[: equal + 1].astype(np.float64) - exact[: equal + 1]
    before = float(np.abs(errors[:equal]).max(initial=0.0))
    if not different:
        return Row(number, len(prompt), equal, len(wanted), 0.0, 0.0, 0.0, before, True)
    margin = float(exact[equal][wanted[equal]] - exact[equal][tokens[equal]])
    error, rms = float(np.abs(errors[equal]).max()), float(np.sqrt((errors[equal] ** 2).mean()))
    # an engine that is wrong there would turn round any margin: what it makes of all the vocabulary has to be near HF's
    return Row(number, len(prompt), equal, len(wanted), margin, error, rms, before, margin <= tie and rms <= tie)


def table_line(row: Row) -> str:
    head = f"prompt {row.prompt} ({row.prompt_tokens:2} tokens): {row.equal:3} of {row.length} tokens are HF's"
    if row.equal == row.length:
        return f"{head}, logits within {row.error_before:.4f}"
    return (
        f"{head}; then HF prefers its own by {row.margin:.4f}, where the engine's logits are off by {row.error:.4f} at most and"
        f" {row.rms:.4f} rms ({row.error_before:.4f} before): {'a tie' if row.passed else 'NO TIE'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of all rows")
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--prompts", type=int, choices=range(1, len(LENGTHS) + 1), default=len(LENGTHS))
    parser.add_argument("--output_len", type=int, default=64)
    options = parser.parse_args(arguments)
    try:
        artifact = Artifact.open(options.engine_dir, ("engine",))
        job = Job.of(artifact)
        prompts = read_prompts(job, options.model_dir, options.prompts)
        mine = engine_text(artifact, prompts, options.output_len)
    except UserError as error:
        parser.error(str(error))
    assert mine.logits is not None
    theirs = hf_text(options.model_dir, prompts, options.output_len)
    given = zip(prompts, zip(mine.output_ids, mine.logits, strict=True), theirs, strict=True)
    tie = TIE[job.export.dtype]
    rows = [compare(number, prompt, ours, hf, tie) for number, (prompt, ours, hf) in enumerate(given)]
    for row in rows:
        print(table_line(row))
    write_json_atomic(options.output, {"tie": tie, "rows": [asdict(row) for row in rows]})
    equal, passed = sum(row.equal == row.length for row in rows), all(row.passed for row in rows)
    print(f"{equal} of {len(rows)} texts are HF's; the others part at {'ties' if passed else 'MORE THAN TIES'}")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
