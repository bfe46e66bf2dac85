"""The shipped tiny Mixtral is what its card says, and the scripts that trained it work, at a small scale."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, MixtralForCausalLM

from moecompiler.tools import tiny_mixtral_card as card_lib
from moecompiler.tools import tiny_mixtral_corpus as corpus_lib
from moecompiler.tools import train_tiny_mixtral as training

pytestmark = pytest.mark.xdist_group("tiny_mixtral")  # one process loads the model and trains the tokenizer

SHIPPED = Path(__file__).parent / "data" / "tiny-mixtral"
CONFIG = json.loads((SHIPPED / "config.json").read_text())
METRICS = json.loads((SHIPPED / "metrics.json").read_text())
RECORDED = METRICS["evaluation"]
HELD_OUT = (SHIPPED / "heldout.txt").read_bytes().decode()
# of the running Python's library: enough text for the vocabulary, and two files that are held out
LIBRARY_FILES = ("argparse.py", "ast.py", "copyreg.py", "inspect.py", "json/decoder.py", "selectors.py", "tarfile.py")
PROMPTS = ("def read_lines(path):\n", "class Stack:\n\n    def push(self):\n", "x = 1\n\n", "\n", "a  \n", "\tb\r\n")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Test processes share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="module")
def excerpt(tokenizer: Tokenizer) -> np.ndarray:
    return np.array(tokenizer.encode(HELD_OUT).ids[: RECORDED["excerpt_tokens"]], dtype=np.int64)


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    for name in LIBRARY_FILES:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(sysconfig.get_path("stdlib")) / name, root / name)
    return root


@pytest.fixture(scope="module")
def corpus(library: Path) -> corpus_lib.Corpus:
    return corpus_lib.load_corpus(library, "3.0")


@pytest.fixture(scope="module")
def small_tokenizer(corpus: corpus_lib.Corpus) -> Tokenizer:
    return corpus_lib.train_tokenizer(corpus.train)


def check_encoding(tokenizer: Tokenizer, text: str) -> None:
    """Decoding gives the text back, and no token spans the end of a line or of an indentation."""
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    pieces = re.findall(r"(?m)^[ \t]+|[^\n]+|\n", text)
    assert "".join(pieces) == text
    assert ids == [index for encoding in tokenizer.encode_batch(pieces) for index in encoding.ids]


def check_prompts(tokenizer: Tokenizer) -> None:
    """What a prompt that ends in a line break is encoded as begins the encoding of all that goes on from it."""
    for prompt, rest in itertools.product(PROMPTS, ("    return x", "\n\n    pass\n", "\tx", " ", "x", "\r\n")):
        ids = tokenizer.encode(prompt).ids
        assert tokenizer.encode(prompt + rest).ids[: len(ids)] == ids


# ---- the shipped files ----


def test_architecture() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size < 8_000_000
    assert CONFIG["architectures"] == ["MixtralForCausalLM"]
    assert CONFIG["dtype"] == "bfloat16"
    assert CONFIG["num_hidden_layers"] == 4
    assert (CONFIG["num_local_experts"], CONFIG["num_experts_per_tok"]) == (8, 2)
    assert (CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]) == (8, 2)
    assert CONFIG["vocab_size"] == corpus_lib.VOCAB_SIZE == 1536
    made = training.make_config(METRICS["training"]["aux"])
    for name in ("hidden_size", "intermediate_size", "head_dim", "max_position_embeddings", "num_hidden_layers"):
        assert CONFIG[name] == getattr(made, name), name


def test_records_agree(tokenizer: Tokenizer, model: MixtralForCausalLM) -> None:
    ids = np.array(tokenizer.encode(HELD_OUT).ids)
    assert RECORDED["held_out_bytes"] == len(HELD_OUT.encode())
    assert RECORDED["held_out_tokens"] == len(ids)
    assert RECORDED["scored_tokens"] == len(corpus_lib.scored_tokens(ids))
    assert METRICS["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert (SHIPPED / "README.md").read_text() == card_lib.model_card(METRICS, SHIPPED)
    assert all(map(corpus_lib.is_held_out, METRICS["corpus"]["held_out_files"]))
    defaults = vars(training.parse_arguments(["--out", "x"]))
    for name in ("steps", *card_lib.TRAINING_OPTIONS):
        assert defaults[name] == METRICS["training"][name], name


def test_tokenizer(tokenizer: Tokenizer) -> None:
    check_encoding(tokenizer, HELD_OUT)
    check_encoding(tokenizer, "déjà vu\t→ 漢字\r\n\f\n \t 'x'  \n\n\n  ")
    check_prompts(tokenizer)


def test_tokenizer_of_transformers_is_the_same(tokenizer: Tokenizer) -> None:
    other = AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)
    ids = other.encode(HELD_OUT)
    assert ids == tokenizer.encode(HELD_OUT).ids
    assert other.decode(ids) == HELD_OUT
    assert other.eos_token_id == CONFIG["eos_token_id"] == tokenizer.token_to_id(corpus_lib.END_OF_TEXT)


def test_perplexity(model: MixtralForCausalLM, excerpt: np.ndarray) -> None:
    perplexity = math.exp(corpus_lib.mean_nats(model, excerpt))
    assert perplexity == pytest.approx(RECORDED["excerpt_perplexity"], rel=0.02)
    counts = np.array(METRICS["unigram_counts"].split(), dtype=np.int64)
    assert counts.sum() == METRICS["corpus"]["train_tokens"]
    unigram = math.exp(corpus_lib.unigram_nats(counts, corpus_lib.scored_tokens(excerpt)))
    assert unigram == pytest.approx(RECORDED["excerpt_unigram_perplexity"], rel=1e-4)
    assert 20 * perplexity < unigram
    assert 20 * RECORDED["perplexity"] < RECORDED["unigram_perplexity"]


def test_every_expert_works(model: MixtralForCausalLM, excerpt: np.ndarray) -> None:
    shares = np.array(corpus_lib.expert_shares(model, excerpt))
    assert shares.shape == (4, 8)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-3)
    assert shares.min() > 0.03
    assert shares.max() < 0.30
    assert min(map(min, RECORDED["expert_shares"])) == RECORDED["expert_share_min"] > 0.05
    assert max(map(max, RECORDED["expert_shares"])) == RECORDED["expert_share_max"] < 0.25


@pytest.mark.parametrize("prompt", ["def read_lines(path):\n", "class Stack:\n    def push(self, item):\n"])
def test_greedy_text_goes_on_in_the_body(model: MixtralForCausalLM, tokenizer: Tokenizer, prompt: str) -> None:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(output[0].tolist())
    assert text.startswith(prompt)
    outer = re.findall(r"(?m)^ *(?=def)", prompt)[0]
    assert re.match(outer + r"[ \t]+\S", text[len(prompt) :]), text


# ---- corpus and tokenizer ----


def test_split_depends_on_the_paths_alone() -> None:
    names = [f"package{index % 7}/module{index}.py" for index in range(20_000)]
    share = sum(map(corpus_lib.is_held_out, names)) / len(names)
    assert share == pytest.approx(corpus_lib.HELD_OUT_PER_MILLE / 1000, rel=0.15)
    assert [name for name in LIBRARY_FILES if corpus_lib.is_held_out(name)] == ["copyreg.py", "selectors.py"]
    assert corpus_lib.is_source("json/decoder.py")
    for name in (
        "test/test_json.py",
        "site-packages/x.py",
        "encodings/cp437.py",
        "_sysconfigdata_x.py",
        "config-3/x.py",
    ):
        assert not corpus_lib.is_source(name)


def test_corpus_is_reproducible_and_disjoint(library: Path, corpus: corpus_lib.Corpus, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in reversed(LIBRARY_FILES):  # found in another order
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library / name, copy / name)
    (copy / "test").mkdir()
    (copy / "test" / "test_x.py").write_text("left_out = True\n")
    assert corpus_lib.load_corpus(copy, "3.0") == corpus

    assert corpus.held_out_files == ["copyreg.py", "selectors.py"]
    assert len(corpus.train) == len(LIBRARY_FILES) - 2
    for name in corpus.held_out_files:
        text = (library / name).read_text()
        assert all(text[:500] not in other for other in corpus.train)
        assert text[:500] in corpus.held_out
    whole = "".join((library / name).read_text() for name in corpus.held_out_files)
    assert len(corpus.held_out) + sum(map(len, corpus.validation)) == len(whole)

    with (copy / "ast.py").open("a") as file:
        file.write("# changed\n")
    assert corpus_lib.load_corpus(copy, "3.0").sha256 != corpus.sha256


def test_tokenizer_of_a_small_text(corpus: corpus_lib.Corpus, small_tokenizer: Tokenizer) -> None:
    check_encoding(small_tokenizer, corpus.held_out)
    check_prompts(small_tokenizer)
    assert small_tokenizer.token_to_id(corpus_lib.END_OF_TEXT) == 0
    lengths = corpus_lib.token_bytes(small_tokenizer)
    assert lengths[small_tokenizer.encode(corpus.held_out).ids].sum() == len(corpus.held_out.encode())
    with pytest.raises(corpus_lib.InputError, match="too small"):
        corpus_lib.train_tokenizer(["x = 1\n"])


# ---- training ----


def test_batches_cover_an_epoch_and_repeat_with_the_seed() -> None:
    first, second, other = (training.window_batches(1000, 10, 4, seed) for seed in (0, 0, 1))
    epoch = torch.cat(list(itertools.islice(first, 24)))
    assert len(set(epoch.tolist())) == 96
    assert len({int(start) % 10 for start in epoch}) == 1
    assert 0 <= epoch.min() <= epoch.max() < 1000 - 10
    assert torch.equal(epoch, torch.cat(list(itertools.islice(second, 24))))
    assert not torch.equal(epoch, torch.cat(list(itertools.islice(other, 24))))
    with pytest.raises(corpus_lib.InputError, match="too few"):
        next(training.window_batches(40, 10, 4, 0))


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [training.learning_rate(step, 1000, 2.0) for step in range(1001)]
    peak = rates.index(max(rates))
    assert rates[peak] == 2.0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.02)


def test_balance_loss() -> None:
    even = torch.eye(8).repeat(3, 1) * 9 + torch.eye(8).roll(1, 0).repeat(3, 1) * 8
    one_sided = torch.zeros(24, 8)
    one_sided[:, :2] = 9
    assert training.balance_loss((even,), 8, 2).item() == pytest.approx(2, rel=1e-4)
    assert training.balance_loss((one_sided,), 8, 2).item() == pytest.approx(8, rel=1e-2)
    mixed = training.balance_loss((one_sided, one_sided.flip(1)), 8, 2)  # even in sum, not in either layer
    assert mixed.item() == pytest.approx(8, rel=1e-2)


def test_steps_reduce_the_loss(corpus: corpus_lib.Corpus, small_tokenizer: Tokenizer) -> None:
    ids = corpus_lib.encode_texts(small_tokenizer, corpus.train[:1])
    rows = torch.from_numpy(ids[: 4 * 65].reshape(4, 65))
    torch.manual_seed(0)
    model = MixtralForCausalLM._from_config(training.make_config(0.02), experts_implementation="eager")
    model.bfloat16().train()
    optimizer = training.MasterAdamW(list(model.parameters()), lr=1e-3, weight_decay=0.1)
    seen = []
    for _ in range(3):
        loss, balance = training.losses(model, rows)
        seen.append(loss.item())
        (loss + 0.02 * balance).backward()
        optimizer.step(1e-3)
    assert seen[0] == pytest.approx(math.log(corpus_lib.VOCAB_SIZE), rel=0.05)
    assert seen[0] > seen[1] > seen[2]
    for master, weight in zip(optimizer.masters, optimizer.weights, strict=True):
        assert torch.equal(master.bfloat16(), weight)


def test_command_trains_and_evaluates(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card_lib, "SAMPLE_PROMPTS", ("def f():\n",))
    monkeypatch.setattr(card_lib, "SAMPLE_TOKENS", 8)
    monkeypatch.setattr(corpus_lib, "HELD_OUT_FILE_BYTES", 1500)
    out = tmp_path / "out"
    small = ["--steps", "2", "--batch", "2", "--window", "32", "--log-every", "1", "--device", "cpu"]
    assert training.main(["--out", str(out), "--corpus", str(library), "--corpus-version", "3.0", *small]) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in SHIPPED.iterdir()}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.keys() == METRICS.keys()
    assert metrics["evaluation"].keys() == RECORDED.keys()
    assert [entry["step"] for entry in metrics["training"]["log"]] == [1, 2]
    assert metrics["training"]["tokens_seen"] == 2 * 2 * 32
    assert "Python 3.0 standard library" in (out / "README.md").read_text()

    written = hashlib.sha256((out / "metrics.json").read_bytes()).hexdigest()
    capsys.readouterr()
    assert training.main(["--evaluate", str(out), "--device", "cpu"]) == 0
    again = json.loads(capsys.readouterr().out)
    for name, value in metrics["evaluation"].items():
        assert again[name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name
    assert hashlib.sha256((out / "metrics.json").read_bytes()).hexdigest() == written


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--out", str(tmp_path / "out"), "--corpus", str(tmp_path)], "--corpus-version"),
        (
            ["--out", str(tmp_path / "out"), "--corpus", str(tmp_path), "--corpus-version", "3"],
            "no Python standard lib",
        ),
        (["--evaluate", str(tmp_path)], "config.json is missing"),
    ):
        assert training.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
