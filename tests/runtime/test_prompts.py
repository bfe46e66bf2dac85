from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from moecompiler.errors import UserError
from moecompiler.runtime.prompts import (
    FastTokenizer,
    StreamingDetokenizer,
    Tokenizer,
    TransformersTokenizer,
    load_tokenizer,
    read_prompts,
)

CORPUS = ["def add(a, b):\n    return a + b\n", "the quick brown fox", "naïve café", "for x in range(10): print(x)"] * 5
TEXTS = [
    "def café():",
    "日本語 and 😀👩‍👩‍👧 end",
    "  two  spaces\n\tand a tab ",
    "naïve",
    "a\N{REPLACEMENT CHARACTER}b",
    "é",
]


def byte_level() -> Backend:
    """As GPT-2's: a token is a run of bytes, characters outside of the corpus are cut into several tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def sentencepiece_like() -> Backend:
    """As Mixtral's: ``▁`` for a space, dropped at the start of a text; a token per byte of unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefinorstuw()+,:.é"]
    pieces += ["de", "def", "▁def", "an", "and", "▁and", "en", "end", "▁end"]
    merges = [("d", "e"), ("de", "f"), ("▁", "def"), ("a", "n"), ("an", "d"), ("▁", "and"), ("e", "n"), ("en", "d")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, [*merges, ("▁", "end")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in ("<unk>", "<s>", "</s>")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


BACKENDS = {"byte level": byte_level, "sentencepiece-like": sentencepiece_like}


@pytest.fixture(params=BACKENDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    BACKENDS[request.param]().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def tokenizer(folder: Path) -> FastTokenizer:
    return FastTokenizer(folder / "tokenizer.json")


def no_tokenizer() -> Tokenizer:
    raise AssertionError("there is no text to encode")


def test_transformers_reads_the_same(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    ours, theirs = FastTokenizer(folder / "tokenizer.json"), TransformersTokenizer(folder)
    assert ours.size == theirs.size
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("prompt", ["", "def ", "x", "日本"])
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_whole_text(tokenizer: FastTokenizer, prompt: str, text: str) -> None:
    start, tokens = tokenizer.encode(prompt), tokenizer.encode(text)[1:]
    stream = StreamingDetokenizer(tokenizer, start)
    parts = [stream.add(token) for token in tokens]
    last = stream.finish()
    assert "".join(parts) + last == tokenizer.decode(start + tokens)[len(tokenizer.decode(start)) :]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts) + last
        assert not last
        assert parts.count("") < len(parts)


def test_half_a_character_is_held_back(tokenizer: FastTokenizer) -> None:
    tokens = tokenizer.encode("a😀")
    stream = StreamingDetokenizer(tokenizer, tokens[:1])
    parts = [stream.add(token) for token in tokens[1:-1]]
    assert "".join(parts) == "a"
    held = stream.finish()
    assert held
    assert set(held) == {"\N{REPLACEMENT CHARACTER}"}
    assert stream.finish() == ""


def test_bytes_that_are_no_text_come_out_when_text_follows(tokenizer: FastTokenizer) -> None:
    broken = tokenizer.encode("日")[-1]
    ids = [broken, *tokenizer.encode("and")[1:]]
    stream = StreamingDetokenizer(tokenizer, tokenizer.encode("d"))
    said = "".join(map(stream.add, ids))
    assert said == tokenizer.decode(tokenizer.encode("d") + ids)[1:]
    assert said.startswith("\N{REPLACEMENT CHARACTER}")


def test_special_tokens_say_nothing(tokenizer: FastTokenizer) -> None:
    stream = StreamingDetokenizer(tokenizer, tokenizer.encode("a"))
    eos = 1 if tokenizer.decode([1]) == "" and tokenizer.decode([2]) != "" else 2
    assert stream.add(eos) == ""
    assert stream.finish() == ""


def test_text_prompts(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    loads: list[int] = []

    def load() -> Tokenizer:
        loads.append(1)
        return tokenizer

    expected = [tokenizer.encode("def add"), tokenizer.encode(" naïve ")]
    assert read_prompts(["def add", " naïve "], None, load, 400) == expected
    for name, content in {
        "p.txt": "def add\n naïve \n",
        "p.prompts": "def add\r\n naïve \n\n\n",
        "p": "def add\n naïve ",
    }.items():
        (tmp_path / name).write_bytes(content.encode())
        assert read_prompts([], tmp_path / name, load, 400) == expected
    assert len(loads) == 4  # once per call


def test_csv_rows_may_be_ragged(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("1,2,3\n4\n 5, 6,,\n\n")
    assert read_prompts([], path, no_tokenizer, 10) == [[1, 2, 3], [4], [5, 6]]


@pytest.mark.parametrize(
    ("array", "pad_id", "prompts"),
    [
        (np.array([[1, 2, 3], [4, 5, 6]], np.int32), None, [[1, 2, 3], [4, 5, 6]]),
        (np.array([[1, 2, 3], [4, -1, -1]]), None, [[1, 2, 3], [4]]),
        (np.array([[1, 2, 2], [2, 4, 2]], np.uint16), 2, [[1], [2, 4]]),
        (np.array([7, 8], np.int64), None, [[7, 8]]),
    ],
)
def test_npy(array: np.ndarray, pad_id: int | None, prompts: list[list[int]], tmp_path: Path) -> None:
    path = tmp_path / "p.npy"
    np.save(path, array)
    assert read_prompts([], path, no_tokenizer, 10, pad_id) == prompts
    assert all(type(token) is int for prompt in prompts for token in prompt)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "1,2\n3,x\n", "p.csv: row 2 holds something else than token ids: .*'x'"),
        ("p.csv", "1,2.5\n", "p.csv: row 1 holds something else"),
        ("p.csv", "1\n\n2\n", "p.csv: prompt 2 is empty"),
        ("p.csv", "", "p.csv: holds no prompt"),
        ("p.csv", "1,10\n", "p.csv: prompt 1 holds token id 10; the model has 0 to 9"),
        ("p.csv", "1\n3,-2,3\n", "p.csv: prompt 2 holds token id -2; the model has 0 to 9"),
        ("p.csv", codecs.BOM_UTF16 + "1".encode("utf-16-le"), "p.csv: cannot be read as .csv: .*utf-8"),
        ("p.txt", "a\n\nb\n", "p.txt: prompt 2 is empty"),
        ("p.txt", "\n", "p.txt: prompt 1 is empty"),
        ("p.txt", "", "p.txt: holds no prompt"),
        ("p.txt", b"\xff\xfe", "p.txt: cannot be read as .txt: .*utf-8"),
        ("p.txt", None, "p.txt: not found"),
        ("p.npy", None, "p.npy: not found"),
        ("p.npy", "1,2,3", "p.npy: cannot be read as .npy"),
        ("p.npy", "", "p.npy: cannot be read as .npy"),
        ("p.npy", np.ones((2, 3)), r"p.npy: holds float64\[2, 3\]; prompts are integers \[batch, length\]"),
        ("p.npy", np.ones((2, 3, 4), int), r"p.npy: holds int64\[2, 3, 4\]"),
        ("p.npy", np.array([[1], [2, 3]], object), "p.npy: cannot be read as .npy: an array of objects.*csv"),
        ("p.npy", np.array([[1, 2], [-1, -1]]), "p.npy: prompt 2 is empty"),
        ("p.npy", np.zeros((0, 4), int), "p.npy: holds no prompt"),
    ],
)
def test_bad_files(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts([], path, no_tokenizer, 10)
    assert "\n" not in str(caught.value)


def test_bad_texts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--input_text: prompt 2 is empty"):
        read_prompts(["a", ""], None, no_tokenizer, 10)
    with pytest.raises(UserError, match="--input_text or with --input_file"):
        read_prompts([], None, no_tokenizer, 10)
    with pytest.raises(UserError, match="one of the two"):
        read_prompts(["a"], tmp_path / "p.csv", no_tokenizer, 10)


def test_loading_a_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, 400)
    assert tokenizer.decode(tokenizer.encode("def add")) == "def add"
    with pytest.raises(
        UserError, match=rf"does not fit: it has {tokenizer.size} tokens, the model only 100; .*--tokenizer_dir"
    ):
        load_tokenizer(folder, 100)


def test_no_tokenizer_to_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer beside the engine: .*--tokenizer_dir, or token ids"):
        load_tokenizer(None, 10)
    with pytest.raises(UserError, match=r"holds no tokenizer: .*--tokenizer_dir, or token ids"):
        load_tokenizer(tmp_path, 10)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "missing", 10)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load_tokenizer(tmp_path, 10)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="its tokenizer cannot be read") as caught:
        load_tokenizer(tmp_path, 10)
    assert "\n" not in str(caught.value)
