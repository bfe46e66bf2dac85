"""What is measured on a saved tiny Mixtral, and the model card that reports it; train_tiny_mixtral.py uses both."""

from __future__ import annotations

import datetime
import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from transformers import MixtralForCausalLM

if TYPE_CHECKING or __package__:
    from moecompiler.tools import tiny_mixtral_corpus as corpus_lib
else:  # run as a file, without the package
    import tiny_mixtral_corpus as corpus_lib

SAMPLE_PROMPTS = (
    "def read_lines(path):\n",
    "def read_lines(path):\n    ",
    "class Cache:\n    def get(self, key):\n        try:\n",
    "class Stack:\n    def __len__(self):\n",
    "def write_file(path, data):\n    with open(",
)
SAMPLE_TOKENS = 120
TRAINING_OPTIONS = ("batch", "window", "lr", "weight_decay", "dropout", "aux", "seed")  # recorded, and in the command
EXCERPT_TOKENS = 4096  # at the beginning of heldout.txt: enough for a quick check of a machine or a copy

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixtral, moe, test-model, python]
---

# tiny-mixtral

A Mixtral small enough to keep in a repository, trained so that its answers mean something: it writes recognisable
Python. Accuracy of the compiler is measured on it, against the held-out text beside it. It has no other use.

## Architecture

`MixtralForCausalLM`, {parameters:,} parameters in bfloat16 ({size:,} bytes): 4 layers of width 128, 8 query and 2
key/value heads of 32, 8 experts of inner width 256 with 2 per token, RoPE base 10000, context 1024, no sliding window,
untied output. The tokenizer is a byte-level BPE of 1536 entries. Its one special token, `<|endoftext|>` (id 0), is bos
and eos in the configuration and stood between the files in training; encoding adds none, and prompts need none. A line
break is always a token by itself, and an indentation is apart from what follows it, so a prompt may end before the line
break, after it, or after the indentation.

## Data and licence

{source}: its Python sources with their docstrings, {train_files} files, {train_bytes:,} bytes, {train_tokens:,}
tokens for training. Test suites, installed packages and generated tables are left out. Some 3% of the files, by a hash
of their path, are held out: {held_out_files}. `heldout.txt` is the first 7 KiB of each; the settings were chosen by the
loss on the rest of them. None of their text was trained on. The SHA-256 of the whole selection is
`{sha256}`.

The weights are under Apache-2.0. `heldout.txt` is part of CPython: Copyright (c) 2001 Python Software Foundation, All
Rights Reserved, under the PSF License Agreement, version 2 (https://docs.python.org/3/license.html).

## Metrics

On `heldout.txt` ({held_out_bytes:,} bytes, {held_out_tokens:,} tokens, {scored_tokens:,} of them scored):

| model | perplexity per token | bits per byte |
| --- | ---: | ---: |
| this model | {perplexity:.3f} | {bits_per_byte:.3f} |
| this model, arithmetic in bfloat16 too | {perplexity_bfloat16_arithmetic:.3f} | |
| this model, the first {excerpt_tokens:,} tokens only | {excerpt_perplexity:.3f} | |
| unigram, add-one smoothing | {unigram_perplexity:.1f} | {unigram_bits_per_byte:.3f} |

{protocol} These numbers: {evaluated_with}.

Share of the assignments (2 per token) each expert gets on the same text; equal work is 12.5%:

{shares}

## Training

{steps:,} steps of {batch} windows of {window} tokens ({tokens_seen:,} tokens, {epochs} epochs) in
{wall_seconds:.0f} s on {device}, {date}. {note}
AdamW on float32 masters of the bfloat16 weights, peak learning rate {lr}, weight decay {weight_decay}, dropout
{dropout}, a load-balancing loss in each layer with weight {aux}; Python {python}, torch {torch},
transformers {transformers}, tokenizers {tokenizers}. To train it again, under the Python whose library is named above,
or with that library in `--corpus` and its version in `--corpus-version`:

    {command}

and to measure it on any machine:

    python tools/train_tiny_mixtral.py --evaluate tests/data/tiny-mixtral

The same seed, steps and library give the same tokenizer, initial weights and batches; the weights then differ in their
last digits, since a GPU adds sums in another order from run to run.

## Limits

It has seen one library in one style, and dozens of times: it imitates Python and knows nothing of what it writes. The
held-out files come from the same library as the training files, so perplexity on other code is higher. Positions past
1024 were never trained. After a few lines greedy text mostly repeats itself. `metrics.json` holds all numbers of this
card and the counts behind the unigram model.

## Samples

{samples}
"""


@torch.no_grad()
def write_samples(model: MixtralForCausalLM, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Continue each of `SAMPLE_PROMPTS` by up to `SAMPLE_TOKENS`, greedily and by sampling from a fixed seed."""
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0}
    samples = []
    for prompt in SAMPLE_PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
        for method, options in (("greedy", {"do_sample": False}), ("temperature 0.7, top-p 0.95", sampling)):
            torch.manual_seed(0)
            mask = torch.ones_like(ids)
            output = model.generate(ids, attention_mask=mask, max_new_tokens=SAMPLE_TOKENS, pad_token_id=0, **options)
            samples.append({"prompt": prompt, "method": method, "text": tokenizer.decode(output[0].tolist())})
    return samples


def evaluate(directory: Path, unigram_counts: np.ndarray, device: str) -> dict[str, Any]:
    """Metrics of the model saved in `directory` on its heldout.txt; "protocol" in the result states the rules."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = (directory / "heldout.txt").read_bytes().decode()
    ids = np.array(tokenizer.encode(text).ids, dtype=np.int64)
    scored = corpus_lib.scored_tokens(ids)
    lengths = corpus_lib.token_bytes(tokenizer)
    model = MixtralForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, experts_implementation="eager")
    model.to(device).eval()
    rough = corpus_lib.mean_nats(model, ids)
    model.float()  # the same bfloat16 weights with float32 arithmetic: these numbers agree between machines
    nats = corpus_lib.mean_nats(model, ids)
    unigram = corpus_lib.unigram_nats(unigram_counts, scored)
    excerpt = ids[:EXCERPT_TOKENS]
    unigram_on_excerpt = corpus_lib.unigram_nats(unigram_counts, corpus_lib.scored_tokens(excerpt))
    shares = corpus_lib.expert_shares(model, ids)
    return {
        "protocol": (
            f"heldout.txt is encoded as one text, with no special token added, and cut into windows of {corpus_lib.EVAL_WINDOW} "
            "tokens without overlap (the last one is shorter). Each window is fed by itself from position 0, and all "
            "its tokens but the first are scored. Perplexity is exp(mean -log p) in nats; bits per byte counts the "
            "bytes of the scored tokens. Weights as saved in bfloat16, arithmetic in float32 unless said otherwise. "
            f"The excerpt is the first {EXCERPT_TOKENS} of the text's tokens, by the same rules."
        ),
        "evaluated_with": f"torch {torch.__version__} on {'a GPU' if device == 'cuda' else 'a CPU'}",
        "held_out_bytes": len(text.encode()),
        "held_out_tokens": len(ids),
        "scored_tokens": len(scored),
        "scored_bytes": int(lengths[scored].sum()),
        "perplexity": round(math.exp(nats), 4),
        "bits_per_byte": round(corpus_lib.bits_per_byte(nats, scored, lengths), 4),
        "perplexity_bfloat16_arithmetic": round(math.exp(rough), 4),
        "unigram_perplexity": round(math.exp(unigram), 4),
        "unigram_bits_per_byte": round(corpus_lib.bits_per_byte(unigram, scored, lengths), 4),
        "excerpt_tokens": EXCERPT_TOKENS,
        "excerpt_perplexity": round(math.exp(corpus_lib.mean_nats(model, excerpt)), 4),
        "excerpt_unigram_perplexity": round(math.exp(unigram_on_excerpt), 4),
        "expert_share_min": min(map(min, shares)),
        "expert_share_max": max(map(max, shares)),
        "expert_shares": shares,
        "samples": write_samples(model, tokenizer),
    }


def evaluate_existing(directory: Path, device: str) -> dict[str, Any]:
    """`evaluate` for a directory written earlier; the unigram counts come from its metrics.json."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "heldout.txt", "metrics.json"):
        if not (directory / name).is_file():
            raise corpus_lib.InputError(
                f"{directory / name} is missing: evaluation needs a directory that training wrote"
            )
    try:
        counts = json.loads((directory / "metrics.json").read_text())["unigram_counts"]
        unigram_counts = np.array([int(count) for count in counts.split()], dtype=np.int64)
    except (KeyError, ValueError) as error:
        raise corpus_lib.InputError(f"{directory / 'metrics.json'} holds no usable unigram_counts: {error}") from error
    return evaluate(directory, unigram_counts, device)


def environment(device: str) -> dict[str, str]:
    """What the running training is made with, for metrics.json."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def write_card(directory: Path) -> None:
    """Write README.md for the model in `directory` from its metrics.json."""
    metrics = json.loads((directory / "metrics.json").read_text())
    (directory / "README.md").write_text(model_card(metrics, directory))


def model_card(metrics: dict[str, Any], directory: Path) -> str:
    """The text of README.md for the model in `directory`, from what metrics.json holds."""
    evaluation, training = metrics["evaluation"], metrics["training"]
    experts = range(len(evaluation["expert_shares"][0]))
    rows = [
        "| layer | " + " | ".join(f"expert {index}" for index in experts) + " |",
        "| --- |" + " ---: |" * len(experts),
    ]
    for layer, shares in enumerate(evaluation["expert_shares"]):
        rows.append(f"| {layer} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    form = "From `{prompt!r}`, {method}:\n\n```python\n{text}\n```"
    samples = [form.format_map(sample) for sample in evaluation["samples"]]
    fields = metrics["corpus"] | training | metrics["environment"] | evaluation
    fields["held_out_files"] = ", ".join(f"`{name}`" for name in metrics["corpus"]["held_out_files"])
    fields["shares"] = "\n".join(rows)
    fields["samples"] = "\n\n".join(samples)
    fields["parameters"] = metrics["parameters"]
    fields["size"] = (directory / "model.safetensors").stat().st_size
    options = [f"--{name.replace('_', '-')} {training[name]}" for name in ("steps", *TRAINING_OPTIONS)]
    fields["command"] = " ".join(["python tools/train_tiny_mixtral.py --out tests/data/tiny-mixtral", *options])
    return CARD.format_map(fields)
