"""Train the tiny Mixtral test model on Python's standard library, or evaluate one that is there.

    python tools/train_tiny_mixtral.py --out DIR [--steps N | --minutes M]
    python tools/train_tiny_mixtral.py --evaluate DIR

Training writes a Hugging Face model directory (bfloat16), heldout.txt, metrics.json and a model card. The same seed,
steps and corpus give the same tokenizer, initial weights and batches; a GPU may add sums in another order.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING or __package__:
    from moecompiler.tools import tiny_mixtral_card as card_lib
    from moecompiler.tools import tiny_mixtral_corpus as corpus_lib
else:  # run as a file, without the package
    import tiny_mixtral_card as card_lib
    import tiny_mixtral_corpus as corpus_lib

CONTEXT = 1024  # max_position_embeddings, and the training window
WARMUP_STEPS = 200


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
        raise corpus_lib.InputError(f"the corpus has {length} tokens, too few for batches of {batch} x {window}")
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
    return {name: getattr(args, name) for name in card_lib.TRAINING_OPTIONS} | {
        "steps": steps,
        "warmup_steps": WARMUP_STEPS,
        "tokens_seen": seen,
        "epochs": round(seen / len(ids), 1),
        "wall_seconds": round(time.monotonic() - began, 1),
        "note": args.note,
        "log": log,
    }


def save_model(
    model: MixtralForCausalLM, tokenizer: tokenizers.Tokenizer, corpus: corpus_lib.Corpus, out: Path
) -> None:
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
        "evaluation": card_lib.evaluate(args.out, counts, args.device),
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
        "environment": card_lib.environment(args.device),
        "unigram_counts": " ".join(map(str, counts.tolist())),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    card_lib.write_card(args.out)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults are those of the model in tests/data/tiny-mixtral."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb = parser.add_mutually_exclusive_group(required=True)
    verb.add_argument("--out", type=Path, help="train, and write the model directory here")
    verb.add_argument("--evaluate", type=Path, metavar="DIR", help="print the metrics of an existing model directory")
    verb.add_argument("--card", type=Path, metavar="DIR", help="rewrite the model card in DIR from its metrics.json")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=4940)
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
            print(json.dumps(card_lib.evaluate_existing(args.evaluate, args.device), indent=1))
        elif args.card:
            card_lib.write_card(args.card)
        else:
            args.out.mkdir(parents=True, exist_ok=True)
            train_and_report(args)
    except (corpus_lib.InputError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
