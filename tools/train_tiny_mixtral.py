"""Train the tiny Mixtral test model on Python's standard library, or evaluate one that is there.

    python tools/train_tiny_mixtral.py --out DIR [--steps N | --minutes M]
    python tools/train_tiny_mixtral.py --evaluate DIR

Training writes a Hugging Face model directory (bfloat16), heldout.txt, metrics.json and a model card. The same seed,
steps and corpus give the same tokenizer, initial weights and batches; a GPU may add sums in another order.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny_mixtral_corpus as corpus_lib
import tokenizers
import torch
import transformers
from tiny_mixtral_corpus import Corpus, InputError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

CONTEXT = 1024  # max_position_embeddings, and the training window
WARMUP_STEPS = 200
TRAINING_OPTIONS = ("batch", "window", "lr", "weight_decay", "dropout", "aux", "seed")  # recorded, and in the command

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
break and the indentation after it are mostly one token, so a prompt goes on best when it ends before the line break.

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
1024 were never trained. `metrics.json` holds all numbers of this card and the counts behind the unigram model.

## Samples

{samples}
"""


def make_config(aux_coefficient: float) -> MixtralConfig:
    """The architecture: 4 layers of 8 experts with top-2 routing and grouped-query attention, 3.87 M parameters."""
    return MixtralConfig(
        vocab_size=corpus_lib.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=aux_coefficient,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def add_dropout(model: MixtralForCausalLM, rate: float) -> None:
    """Drop embeddings and the outputs of attention and experts while training; transformers' Mixtral has no option.

    The corpus is small enough that the model sees it dozens of times, so this is what keeps it from learning it by
    heart. It is active in train mode only and leaves no trace in the saved model.
    """

    def drop(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # attention returns (hidden states, attention weights)
            return (F.dropout(output[0], rate, module.training), *output[1:])
        return F.dropout(output, rate, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def balance_loss(router_logits: tuple[Tensor, ...], experts: int, top_k: int) -> Tensor:
    """Switch-style load-balancing loss, mean over layers; `top_k` when every expert gets the same work.

    `router_logits` holds one [tokens, experts] per layer. transformers' own sums the layers before the product, so
    that one layer's imbalance can hide behind another's; here each layer has to be balanced by itself.
    """
    losses = []
    for logits in router_logits:
        probability = F.softmax(logits.float(), dim=-1)
        chosen = torch.topk(probability, top_k, dim=-1).indices
        share = F.one_hot(chosen, experts).sum(dim=1).float().mean(dim=0)  # [experts], sums to top_k
        losses.append(experts * (share * probability.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def window_batches(length: int, window: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of window starts, [batch] int64: each epoch covers the tokens once, shifted and shuffled."""
    generator = torch.Generator().manual_seed(seed)
    room = length - window - 1
    if room < window * batch:
        raise InputError(f"the corpus has {length} tokens, too few for batches of {batch} x {window}")
    while True:
        shift = int(torch.randint(window, (1,), generator=generator))
        starts = torch.arange(shift, room, window)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        yield from starts[: len(starts) // batch * batch].split(batch)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over `WARMUP_STEPS`, then a cosine from `peak` to 1% of it at `steps`."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    progress = min(1.0, (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class MasterAdamW:
    """AdamW on float32 masters of bfloat16 weights: the model computes, all through training, with what is saved."""

    def __init__(self, weights: list[Tensor], lr: float, weight_decay: float) -> None:
        self.weights = weights
        self.masters = [weight.detach().float().clone().requires_grad_() for weight in weights]
        self.peak = lr
        matrices = [master for master in self.masters if master.dim() > 1]
        norms = [master for master in self.masters if master.dim() == 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    def step(self, rate: float) -> None:
        """Apply the weights' gradients, clipped to norm 1, with learning rate `rate`, and clear them."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None, "every weight takes part in the loss"
            master.grad = weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def losses(model: MixtralForCausalLM, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token loss in nats and load-balancing loss of token rows [batch, window + 1]."""
    output = model.model(input_ids=rows[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state).float()
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    config = model.config
    return loss, balance_loss(output.router_logits, config.num_local_experts, config.num_experts_per_tok)


def train(
    model: MixtralForCausalLM, ids: np.ndarray, validation: np.ndarray, args: argparse.Namespace
) -> dict[str, Any]:
    """Train `model` (bfloat16, on its device) on the token vector `ids`; return what was done.

    With `--minutes` the number of steps is set from the speed over the second half of the warm-up.
    """
    optimizer = MasterAdamW(list(model.parameters()), args.lr, args.weight_decay)
    data = torch.from_numpy(ids).to(model.device)
    span = torch.arange(args.window + 1, device=model.device)
    batches = window_batches(len(ids), args.window, args.batch, args.seed)
    steps = sys.maxsize if args.minutes else args.steps
    log: list[dict[str, float]] = []
    began = halfway = time.monotonic()
    step = 0
    while step < steps:
        loss, balance = losses(model, data[next(batches).to(model.device)[:, None] + span])
        (loss + args.aux * balance).backward()
        optimizer.step(learning_rate(step, steps, args.lr))
        step += 1
        if args.minutes and step == WARMUP_STEPS // 2:
            loss.item()  # waits for the device, so that the clock means something
            halfway = time.monotonic()
        if args.minutes and step == WARMUP_STEPS:
            loss.item()
            now = time.monotonic()
            pace = (now - halfway) / (WARMUP_STEPS - WARMUP_STEPS // 2)
            steps = step + max(1, int((args.minutes * 60 - (now - began)) / pace))
        if step % args.log_every == 0 or step == steps:
            model.eval()
            nats = corpus_lib.mean_nats(model, validation)
            model.train()
            values = {"loss": loss.item(), "balance": balance.item(), "validation": nats}
            log.append({"step": step} | {key: round(value, 4) for key, value in values.items()})
            print(f"{time.monotonic() - began:7.1f} s {json.dumps(log[-1])}", file=sys.stderr, flush=True)
    seen = steps * args.batch * args.window
    return {name: getattr(args, name) for name in TRAINING_OPTIONS} | {
        "steps": steps,
        "warmup_steps": WARMUP_STEPS,
        "tokens_seen": seen,
        "epochs": round(seen / len(ids), 1),
        "wall_seconds": round(time.monotonic() - began, 1),
        "note": args.note,
        "log": log,
    }


def save_model(model: MixtralForCausalLM, tokenizer: tokenizers.Tokenizer, corpus: Corpus, out: Path) -> None:
    """Write the model directory: bfloat16 weights, configuration, tokenizer and heldout.txt."""
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    model.save_pretrained(out)
    end = corpus_lib.END_OF_TEXT
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, model_max_length=CONTEXT
    ).save_pretrained(out)
    (out / "heldout.txt").write_bytes(corpus.held_out.encode())


def train_and_report(args: argparse.Namespace) -> None:
    """Train from nothing, save to `args.out`, evaluate what was saved, and write metrics.json and the model card."""
    corpus = corpus_lib.load_corpus(args.corpus, args.corpus_version)
    tokenizer = corpus_lib.train_tokenizer(corpus.train)
    ids = corpus_lib.encode_texts(tokenizer, corpus.train)
    validation = corpus_lib.encode_texts(tokenizer, corpus.validation)
    counts = np.bincount(ids, minlength=corpus_lib.VOCAB_SIZE)
    torch.manual_seed(args.seed)
    model = MixtralForCausalLM._from_config(make_config(args.aux), experts_implementation="grouped_mm")
    add_dropout(model, args.dropout)
    model.to(device=args.device, dtype=torch.bfloat16).train()
    training = train(model, ids, validation, args)
    save_model(model, tokenizer, corpus, args.out)
    metrics = {
        "evaluation": corpus_lib.evaluate(args.out, counts, args.device),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "corpus": {
            "source": f"Python {corpus.version} standard library",
            "sha256": corpus.sha256,
            "train_files": len(corpus.train),
            "train_bytes": corpus.train_bytes,
            "train_tokens": len(ids),
            "held_out_files": corpus.held_out_files,
        },
        "training": training,
        "environment": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "unigram_counts": " ".join(map(str, counts.tolist())),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (args.out / "README.md").write_text(model_card(metrics, args.out))


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


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults are those of the model in tests/data/tiny-mixtral."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb = parser.add_mutually_exclusive_group(required=True)
    verb.add_argument("--out", type=Path, help="train, and write the model directory here")
    verb.add_argument("--evaluate", type=Path, metavar="DIR", help="print the metrics of an existing model directory")
    verb.add_argument("--card", type=Path, metavar="DIR", help="rewrite the model card in DIR from its metrics.json")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=4616)
    length.add_argument("--minutes", type=float, help="choose the number of steps for this wall time instead")
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--window", type=int, default=CONTEXT, help="tokens per window")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=1.5)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--aux", type=float, default=0.02, help="weight of the load-balancing loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=500, help="steps between validations")
    parser.add_argument("--corpus", type=Path, help="a Python library directory (default: the running Python's)")
    parser.add_argument("--corpus-version", help="the Python version of --corpus")
    parser.add_argument("--note", default="", help="a sentence about the run, for metrics.json and the card")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    if min(args.steps, args.batch, args.window, args.log_every) < 1 or (args.minutes or 1) <= 0:
        parser.error("--steps, --minutes, --batch, --window and --log-every must be positive")
    if not 0 <= args.dropout < 1:
        parser.error("--dropout is a rate from 0 up to, but not including, 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.window > CONTEXT:
        parser.error(f"--window is at most {CONTEXT}, the model's context")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one line about bad input."""
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        if args.evaluate:
            print(json.dumps(corpus_lib.evaluate_existing(args.evaluate, args.device), indent=1))
        elif args.card:
            metrics = json.loads((args.card / "metrics.json").read_text())
            (args.card / "README.md").write_text(model_card(metrics, args.card))
        else:
            args.out.mkdir(parents=True, exist_ok=True)
            train_and_report(args)
    except (InputError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
