"""Every bad input of the data room: one clear line each."""

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from data_cases import numbered

from transnormer.data import (
    ByteTokenizer,
    Corpus,
    Document,
    Loader,
    TokenSource,
    load_tokenizer,
    make_tokenizer,
    read_documents,
    tokenize_corpus,
    train_bpe,
    train_tokenizer,
    write_shards,
)
from transnormer.data.tokenizers import TiktokenTokenizer

BYTES = ByteTokenizer()
GZ, XZ = gzip.compress(b"text" * 999), lzma.compress(b"text" * 999)
ZST = zstandard.ZstdCompressor().compress(b"text" * 999)


def read(name: str, content: bytes) -> Callable[[Path], object]:
    """Read the documents of a file with this content."""

    def case(folder: Path) -> object:
        (folder / name).write_bytes(content)
        return list(read_documents(str(folder / name)))

    return case


def load(name: str, content: bytes) -> Callable[[Path], object]:
    """Load a tokenizer file with this content."""

    def case(folder: Path) -> object:
        (folder / name).write_bytes(content)
        return load_tokenizer(folder / name)

    return case


def small_source(folder: Path) -> TokenSource:
    """A source of 11 tokens."""
    write_shards(numbered([10]), BYTES, folder / "shards", source="my text")
    return TokenSource(folder / "shards")


def two_tokenizers(folder: Path) -> object:
    """A loader of sources whose ids mean different things."""
    write_shards(numbered([10]), train_bpe(["abc " * 9], 259), folder / "other", source="b")
    other = TokenSource(folder / "other")
    return Loader([(small_source(folder), 1.0), (other, 1.0)], seq=4, batch=1, seed=0)


def one_text(folder: Path, text: str, **options: object) -> Corpus:
    """A corpus of one text file."""
    (folder / "a.txt").write_text(text)
    return Corpus(str(folder / "a.txt"), **options)


CASES: dict[str, tuple[type[Exception], str, Callable[[Path], object]]] = {
    "missing file": (
        FileNotFoundError,
        r"data.path is '.*no\.txt'; expected a file, a directory, a glob.*; check the path",
        lambda folder: list(read_documents(str(folder / "no.txt"))),
    ),
    "glob without a match": (
        FileNotFoundError,
        r"holds no \.txt, \.md, \.jsonl file; expected at least one",
        lambda folder: list(read_documents(str(folder / "*.txt"))),
    ),
    "directory without a text": (
        FileNotFoundError,
        "expected at least one; check the path",
        lambda folder: list(read_documents(str(folder))),
    ),
    "file of an unknown kind that is no text": (
        ValueError,
        r"a\.pdf is not UTF-8: byte 0xff at 0",
        read("a.pdf", b"\xff"),
    ),
    "empty file": (ValueError, "which holds no text; expected some text", read("a.txt", b"")),
    "jsonl of empty texts": (
        ValueError,
        "which holds no text",
        read("a.jsonl", b'{"text": ""}\n\n'),
    ),
    "text is not UTF-8": (
        ValueError,
        r"a\.txt is not UTF-8: byte 0xff at 3; expected UTF-8 text; convert the file",
        read("a.txt", b"abc\xff"),
    ),
    "line is not UTF-8": (
        ValueError,
        r"a\.jsonl:2 is not UTF-8: byte 0xe9",
        read("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}'),
    ),
    "line is not JSON": (
        ValueError,
        r"a\.jsonl:2 is not JSON: .*expected one object on each line",
        read("a.jsonl", b'{"text": "a"}\n{"text": '),
    ),
    "line is no object": (ValueError, r"a\.jsonl:1 has no text", read("a.jsonl", b"[1]")),
    "line has no text": (ValueError, r"a\.jsonl:1 has no text", read("a.jsonl", b'{"body": "a"}')),
    "text is a number": (ValueError, r"a\.jsonl:1 has no text", read("a.jsonl", b'{"text": 3}')),
    "text holds a surrogate": (
        ValueError,
        r"a\.jsonl:1 holds a lone surrogate",
        read("a.jsonl", b'{"text": "a\\ud800"}'),
    ),
    "line holds a number too long to read": (
        ValueError,
        r"a\.jsonl:2 is not JSON: Exceeds the limit",
        read("a.jsonl", b'{"text": "a"}\n{"text": "a", "n": ' + b"1" * 4301 + b"}"),
    ),
    "missing file of another name": (
        FileNotFoundError,
        r"--text is '.*no\.txt'; expected a file",
        lambda folder: list(read_documents(str(folder / "no.txt"), name="--text")),
    ),
    "empty file of another name": (
        ValueError,
        "TEXT is '.*', which holds no text",
        lambda folder: (
            (folder / "a.txt").touch(),
            tokenize_corpus(str(folder / "a.txt"), "bytes", folder / "out", name="TEXT"),
        ),
    ),
    "glob of another name": (
        FileNotFoundError,
        "TEXT is '.*', which holds no",
        lambda folder: train_tokenizer(str(folder / "*"), 300, folder / "out", name="TEXT"),
    ),
    "one character of another name": (
        ValueError,
        "TEXT is '.*' with 1 characters",
        lambda folder: list(one_text(folder, "x", name="TEXT").documents("train")),
    ),
    "deeply nested line": (
        ValueError,
        r"a\.jsonl:1 is not JSON",
        read("a.jsonl", b'{"text": ' + b"[" * 200_000),
    ),
    "cut .gz": (ValueError, r"a\.txt\.gz is damaged", read("a.txt.gz", GZ[:-9])),
    "cut .xz": (ValueError, r"a\.txt\.xz is damaged", read("a.txt.xz", XZ[:-9])),
    "cut .zst": (ValueError, r"a\.txt\.zst is damaged", read("a.txt.zst", ZST[:-3])),
    "no .gz": (ValueError, r"a\.txt\.gz is damaged.*fetch it again", read("a.txt.gz", b"text")),
    "no .xz": (ValueError, r"a\.txt\.xz is damaged", read("a.txt.xz", b"text")),
    "no .zst": (ValueError, r"a\.txt\.zst is damaged", read("a.txt.zst", b"text")),
    "held-out fraction of 1": (
        ValueError,
        "data.heldout is 1; expected 0 <= fraction < 1",
        lambda folder: one_text(folder, "text", heldout=1),
    ),
    "negative held-out fraction": (
        ValueError,
        "data.heldout is -0.1; expected 0 <= fraction < 1",
        lambda folder: one_text(folder, "text", heldout=-0.1),
    ),
    "one character, split": (
        ValueError,
        "with 1 characters; expected enough for a train part of it",
        lambda folder: list(one_text(folder, "x").documents("train")),
    ),
    "missing held-out file": (
        FileNotFoundError,
        "data.heldout is 'nowhere.txt'",
        lambda folder: list(one_text(folder, "x", heldout="nowhere.txt").documents("heldout")),
    ),
    "unknown split": (
        ValueError,
        "split is 'test'; expected 'train' or 'heldout'",
        lambda folder: list(Corpus("embedded").documents("test")),
    ),
    "missing tokenizer": (
        FileNotFoundError,
        "tokenizer is 'byte'; expected 'bytes', a directory or a tokenizer file",
        lambda folder: load_tokenizer("byte"),
    ),
    "directory without a tokenizer": (
        FileNotFoundError,
        "holds no tokenizer; expected one of",
        load_tokenizer,
    ),
    "unknown tokenizer file": (
        ValueError,
        r"expected a file that ends in \.json, \.model or \.tiktoken",
        load("vocab.txt", b"a\n"),
    ),
    "tokenizer.json is not JSON": (
        ValueError,
        "is not a tokenizer file: .*; expected the JSON of HF tokenizers",
        load("tokenizer.json", b"{"),
    ),
    "tokenizer.json is not UTF-8": (
        ValueError,
        r"tokenizer\.json is not UTF-8",
        load("tokenizer.json", b"\xff"),
    ),
    "tokenizer.json of something else": (
        ValueError,
        "is not a tokenizer file",
        load("tokenizer.json", b'{"a": 1}'),
    ),
    "changed byte tokenizer": (
        ValueError,
        "is not the byte tokenizer's file",
        load("byte_tokenizer.json", b"{}"),
    ),
    "tokenizer.model is no model": (
        ValueError,
        "is not a SentencePiece model",
        load("tokenizer.model", b"\x12\xff\xff\xff\x7f"),
    ),
    "tokenizer.model is empty": (
        ValueError,
        "is not a SentencePiece model",
        load("tokenizer.model", b""),
    ),
    "tokenizer.model is text": (
        ValueError,
        "is not a SentencePiece model",
        load("tokenizer.model", b"version https://git-lfs"),
    ),
    "rank file is empty": (ValueError, "is empty; expected", load("qwen.tiktoken", b"\n")),
    "rank file has a bad line": (
        ValueError,
        r"qwen\.tiktoken:2 is b'\?\? 1'; expected a base64 token and its rank",
        load("qwen.tiktoken", b"YQ== 0\n?? 1"),
    ),
    "rank file lacks bytes": (
        ValueError,
        "has no rank for 255 single bytes .*; expected all 256",
        load("qwen.tiktoken", b"YQ== 0"),
    ),
    "rank file of an unknown name": (
        ValueError,
        r"does not say how words are cut.*mine\.tiktoken\.json beside it",
        load("mine.tiktoken", b"YQ== 0"),
    ),
    "one id for two tokens": (
        ValueError,
        "gives one id to two tokens",
        lambda folder: TiktokenTokenizer({bytes([b]): b for b in range(256)}, r"\S", {"</s>": 5}),
    ),
    "pattern that is none": (
        ValueError,
        r"has the pattern '\(', which fails",
        lambda folder: TiktokenTokenizer({bytes([b]): b for b in range(256)}, "(", {}),
    ),
    "text with a surrogate": (
        ValueError,
        r"text holds the lone surrogate U\+D800 at 1; expected text that UTF-8 can hold",
        lambda folder: BYTES.encode("a\ud800"),
    ),
    "text is bytes": (TypeError, "text is bytes; expected str", lambda folder: BYTES.encode(b"a")),
    "one text as a batch": (
        TypeError,
        "texts is a str; expected a sequence of str",
        lambda folder: BYTES.encode_batch("text"),
    ),
    "id beyond the vocabulary": (
        ValueError,
        "token id is 259; expected 0 to 258; the model and the tokenizer",
        lambda folder: BYTES.decode([1, 259]),
    ),
    "vocabulary smaller than the bytes": (
        ValueError,
        "vocab_size is 100; expected at least 259",
        lambda folder: train_bpe(["text"], 100),
    ),
    "vocabulary larger than the text gives": (
        ValueError,
        "vocab_size is 4000; expected at most 2.., which is all that the training text gives",
        lambda folder: train_bpe(["text text text"], 4000),
    ),
    "digits cut in an unknown way": (
        ValueError,
        "digits is 'pairs'; expected one of whole, threes, singly",
        lambda folder: train_bpe(["text"], 300, digits="pairs"),
    ),
    "bpe without a number": (
        ValueError,
        "data.tokenizer is 'bpe:4k'; expected bpe:N",
        lambda folder: make_tokenizer("bpe:4k", iter(["text"])),
    ),
    "bpe of too few ids": (
        ValueError,
        "data.tokenizer is 'bpe:258'; expected bpe:N with N at least 259",
        lambda folder: make_tokenizer("bpe:258", iter(["text"])),
    ),
    "corpus without documents": (
        ValueError,
        "holds no text; expected some documents",
        lambda folder: write_shards([], BYTES, folder / "out"),
    ),
    "tokenizer without an end": (
        ValueError,
        "tokenizer has no end-of-text token",
        lambda folder: write_shards(
            [Document("a", "x")],
            TiktokenTokenizer({bytes([b]): b for b in range(256)}, r"\S", {}),
            folder / "out",
        ),
    ),
    "text that the tokenizer cannot express": (
        ValueError,
        "document b: tokenizer .* cannot express the text near byte 0",
        lambda folder: write_shards(
            [Document("a", "x"), Document("b", " ")],
            TiktokenTokenizer({bytes([b]): b for b in range(256)}, r"\S", {"</s>": 300}),
            folder / "out",
        ),
    ),
    "no tokens in a shard": (
        ValueError,
        "shard_tokens is 0; expected at least 1",
        lambda folder: write_shards(numbered([3]), BYTES, folder / "out", shard_tokens=0),
    ),
    "no shards": (
        FileNotFoundError,
        r"manifest\.json is missing; expected a directory that transnormer tokenize made",
        TokenSource,
    ),
    "tokens beyond the end": (
        ValueError,
        "tokens 5 to 12 are asked of my text; expected 0 to 11",
        lambda folder: small_source(folder).tokens(5, 12),
    ),
    "document beyond the end": (
        ValueError,
        "document is 1; expected 0 to 0",
        lambda folder: small_source(folder).document(1),
    ),
    "corpus shorter than one window": (
        ValueError,
        "data my text holds 11 tokens; expected at least 12, one window of data.seq; give more "
        "text or lower data.seq",
        lambda folder: Loader([(small_source(folder), 1.0)], seq=12, batch=1, seed=0),
    ),
    "seq of 0": (
        ValueError,
        "data.seq is 0; expected at least 1",
        lambda folder: Loader([(small_source(folder), 1.0)], seq=0, batch=1, seed=0),
    ),
    "batch of 0": (
        ValueError,
        "batch is 0; expected at least 1",
        lambda folder: Loader([(small_source(folder), 1.0)], seq=4, batch=0, seed=0),
    ),
    "no source": (
        ValueError,
        "sources is empty",
        lambda folder: Loader([], seq=4, batch=1, seed=0),
    ),
    "unknown packing": (
        ValueError,
        "packing is 'best'; expected 'stream' or 'documents'",
        lambda folder: Loader(
            [(small_source(folder), 1.0)], seq=4, batch=1, seed=0, packing="best"
        ),
    ),
    "sources of two tokenizers": (ValueError, "my text, b have 2 tokenizers", two_tokenizers),
    "negative step": (
        ValueError,
        "step is -1; expected 0 or more",
        lambda folder: Loader([(small_source(folder), 1.0)], seq=4, batch=1, seed=0).batch(-1),
    ),
    "rank outside the world": (
        ValueError,
        "rank is 2 of 2; expected 0 <= rank < world",
        lambda folder: Loader([(small_source(folder), 1.0)], seq=4, batch=2, seed=0).for_rank(2, 2),
    ),
    "batch that ranks cannot share": (
        ValueError,
        "batch is 3 windows; expected a multiple of 2 ranks",
        lambda folder: Loader([(small_source(folder), 1.0)], seq=4, batch=3, seed=0).for_rank(0, 2),
    ),
    "tokenising to a file": (
        FileExistsError,
        "exists; expected a new directory",
        lambda folder: (
            (folder / "out").write_text("x"),
            tokenize_corpus("embedded", "bytes", folder / "out"),
        ),
    ),
}


@pytest.mark.parametrize(("kind", "message", "case"), CASES.values(), ids=CASES)
def test_one_clear_line(
    kind: type[Exception], message: str, case: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        case(tmp_path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
