"""Text, tokenizer and scoring rules of the tiny Mixtral test model; train_tiny_mixtral.py beside it uses them.

The text is Python's own standard library, which every machine with Python has. This module chooses the files,
splits them into training and held-out text, trains the byte-level BPE tokenizer, and fixes how held-out text is
cut into windows and scored.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import MixtralForCausalLM

END_OF_TEXT = "<|endoftext|>"  # the one special token, id 0: between files in training, bos and eos in the config
VOCAB_SIZE = 1536
EVAL_WINDOW = 512  # tokens per held-out window

# Left out: test suites, installed packages, build leftovers, and `encodings` (generated tables that copy each other).
EXCLUDED_DIRS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload"}
)
EXCLUDED_FILES = frozenset({"pydoc_data/topics.py", "stringprep.py", "html/entities.py"})  # generated tables
EXCLUDED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # written per machine, not part of the source
HELD_OUT_PER_MILLE = 30  # of the files, by a hash of the path
HELD_OUT_FILE_BYTES = 7 * 1024  # at most this much of each held-out file goes into heldout.txt
HELD_OUT_TOTAL_BYTES = 100_000


class InputError(ValueError):
    """Bad input from the user; the message is one line that says what to change."""


@dataclass(frozen=True)
class Corpus:
    """The library's text after the split: `train` and `validation` hold one string per file.

    `held_out` is the text of heldout.txt, from the heads of `held_out_files`; `validation` is the rest of those files.
    """

    version: str
    train: list[str]
    validation: list[str]
    held_out: str
    held_out_files: list[str]
    sha256: str

    @property
    def train_bytes(self) -> int:
        """Bytes of training text in UTF-8."""
        return sum(len(text.encode()) for text in self.train)


def is_source(path: str) -> bool:
    """Whether the library file at `path` (relative, with slashes) is hand-written source that belongs in the corpus."""
    *folders, name = path.split("/")
    if path in EXCLUDED_FILES or name.startswith(EXCLUDED_PREFIXES):
        return False
    return not any(folder in EXCLUDED_DIRS or folder.startswith("config-") for folder in folders)


def is_held_out(path: str) -> bool:
    """Whether the file at `path` is held out; depends on the relative path alone, so it is the same everywhere."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def head_of(text: str, limit: int) -> str:
    """The whole lines at the beginning of `text` that fit in `limit` bytes of UTF-8."""
    size = 0
    lines = []
    for line in text.splitlines(keepends=True):
        size += len(line.encode())
        if size > limit:
            break
        lines.append(line)
    return "".join(lines)


def load_corpus(root: Path | None = None, version: str | None = None) -> Corpus:
    """Read the standard library at `root` (default: the running Python's) and split it by file.

    `version` names the Python the files belong to; it is needed when `root` is given, since the files do not say it.
    """
    if root is not None and version is None:
        raise InputError("--corpus needs --corpus-version, the Python version that library belongs to")
    root = root or Path(sysconfig.get_path("stdlib"))
    train, validation, heads, held_out_files = [], [], [], []
    room = HELD_OUT_TOTAL_BYTES
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if not is_source(name):
            continue
        data = path.read_bytes()
        try:
            text = data.decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue  # a few files of old releases are Latin-1
        if not text.strip():
            continue
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
        if not is_held_out(name):
            train.append(text)
            continue
        head = head_of(text, min(HELD_OUT_FILE_BYTES, room))
        room -= len(head.encode())
        heads.append(head)
        held_out_files.append(name)
        if len(text) > len(head):
            validation.append(text[len(head) :])
    if not train or not heads or not validation:
        raise InputError(f"no Python standard library sources found in {root}")
    version = version or platform.python_version()
    return Corpus(version, train, validation, "".join(heads), held_out_files, digest.hexdigest())


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train the byte-level BPE of `VOCAB_SIZE` entries on `texts`; it adds no special tokens when encoding.

    Every line break is a token by itself, and no token joins an indentation to what follows it. So a prompt may end
    after either: its tokens begin the encoding of every text that goes on from it (except by more of the indentation),
    as they do in training.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex(r"^[ \t]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise InputError(f"the text is too small for a vocabulary of {VOCAB_SIZE}: got {tokenizer.get_vocab_size()}")
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Token ids of `texts` as one int64 vector, the end-of-text token before each text and after the last."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for encoding in tokenizer.encode_batch(texts):
        ids.extend(encoding.ids)
        ids.append(end)
    return np.array(ids, dtype=np.int64)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes each token stands for, [VOCAB_SIZE]: a byte-level token is spelled with one character per byte."""
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == END_OF_TEXT else len(token)
    return lengths


def eval_windows(ids: np.ndarray, batch: int = 16) -> Iterator[np.ndarray]:
    """Batches [<= batch, EVAL_WINDOW] of consecutive windows without overlap, and last the shorter one, [1, rest].

    In each window every token but the first is scored, given the window's tokens before it.
    """
    full = len(ids) // EVAL_WINDOW
    windows = ids[: full * EVAL_WINDOW].reshape(full, EVAL_WINDOW)
    for start in range(0, full, batch):
        yield windows[start : start + batch]
    rest = ids[full * EVAL_WINDOW :]
    if len(rest) > 1:
        yield rest[None]


def scored_tokens(ids: np.ndarray) -> np.ndarray:
    """The tokens of `ids` that are scored in `eval_windows`, in order."""
    return np.concatenate([windows[:, 1:].reshape(-1) for windows in eval_windows(ids)])


def unigram_nats(counts: np.ndarray, ids: np.ndarray) -> float:
    """Mean -log p of `ids` in nats, p from the training `counts` [VOCAB_SIZE] with add-one smoothing."""
    log_probability = np.log((counts + 1) / (counts.sum() + len(counts)))
    return float(-log_probability[ids].mean())


def bits_per_byte(nats_per_token: float, ids: np.ndarray, lengths: np.ndarray) -> float:
    """Bits per byte of text from the mean nats per token of `ids`; `lengths` is `token_bytes`."""
    return nats_per_token * len(ids) / math.log(2) / int(lengths[ids].sum())


@torch.no_grad()
def mean_nats(model: MixtralForCausalLM, ids: np.ndarray) -> float:
    """Mean -log p in nats of the scored tokens of the vector `ids`, by the window rule of `eval_windows`."""
    total = 0.0
    for part in eval_windows(ids):
        windows = torch.from_numpy(part).to(model.device)
        logits = model(input_ids=windows, use_cache=False).logits.float()
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
    return total / len(scored_tokens(ids))


@torch.no_grad()
def expert_shares(model: MixtralForCausalLM, ids: np.ndarray) -> list[list[float]]:
    """Share of the top-k assignments each expert gets on `ids`, [layers][experts]; each layer sums to 1."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_local_experts, dtype=torch.int64)
    for part in eval_windows(ids):
        windows = torch.from_numpy(part).to(model.device)
        output = model.model(input_ids=windows, use_cache=False, output_router_logits=True)
        for layer, logits in enumerate(output.router_logits):
            chosen = torch.topk(logits.float(), config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(chosen.flatten().cpu(), minlength=config.num_local_experts)
    return [[round(value, 4) for value in row] for row in (counts / counts.sum(dim=1, keepdim=True)).tolist()]
