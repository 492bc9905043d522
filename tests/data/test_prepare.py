"""tokenize_corpus: from a path to shards and a tokenizer, once and whole."""

import hashlib
import json
from pathlib import Path

import pytest

from transnormer.data import (
    load_tokenizer,
    open_tokenized,
    tokenize_corpus,
    train_bpe,
    train_tokenizer,
)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text whose last tenth has letters of its own."""
    path = tmp_path / "a.txt"
    path.write_text(
        "".join(f"{n} abba cab {n * n} " for n in range(200))[:1800] + "xyzzy " * 33 + "xy"
    )
    return path


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_both_parts_and_the_tokenizer_are_written(
    tokenizer: str, text_file: Path, tmp_path: Path
) -> None:
    corpus = tokenize_corpus(str(text_file), tokenizer, tmp_path / "out")
    text = text_file.read_text()
    for split, expected in (("train", text[:1800]), ("heldout", text[1800:])):
        source = corpus.open(split)
        assert corpus.tokenizer.decode(source.tokens(0, len(source))) == expected
        assert source.num_bytes == len(expected)
    again = open_tokenized(tmp_path / "out")
    assert (again.train, again.heldout) == (corpus.train, corpus.heldout)
    assert again.tokenizer.fingerprint == corpus.tokenizer.fingerprint


def test_a_trained_tokenizer_has_seen_the_training_part_alone(
    text_file: Path, tmp_path: Path
) -> None:
    corpus = tokenize_corpus(str(text_file), "bpe:280", tmp_path / "out")
    train_text = text_file.read_text()[:1800]
    assert corpus.tokenizer.fingerprint == train_bpe([train_text], 280).fingerprint


def test_a_given_tokenizer_is_used(text_file: Path, tmp_path: Path) -> None:
    train_bpe([text_file.read_text()], 270).save(tmp_path / "tokenizer")
    corpus = tokenize_corpus(str(text_file), tmp_path / "tokenizer", tmp_path / "out")
    assert corpus.tokenizer.vocab_size == 270


def test_nothing_held_out_gives_one_part(text_file: Path, tmp_path: Path) -> None:
    corpus = tokenize_corpus(str(text_file), "bytes", tmp_path / "out", heldout=0)
    assert corpus.heldout is None
    assert open_tokenized(tmp_path / "out").heldout is None
    assert not (tmp_path / "out" / "heldout").exists()


def test_a_failure_leaves_nothing(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tokenize_corpus(str(text_file), "bytes", tmp_path / "out", heldout=str(tmp_path / "no"))
    assert sorted(tmp_path.iterdir()) == [text_file]


def test_a_corpus_is_not_overwritten(text_file: Path, tmp_path: Path) -> None:
    tokenize_corpus(str(text_file), "bytes", tmp_path / "out")
    with pytest.raises(FileExistsError, match="delete it or choose another"):
        tokenize_corpus(str(text_file), "bytes", tmp_path / "out")


@pytest.mark.parametrize("heldout", [0, 0.1])
def test_parts_that_do_not_belong_together_are_noticed(
    heldout: float, text_file: Path, tmp_path: Path
) -> None:
    tokenize_corpus(str(text_file), "bytes", tmp_path / "out", heldout=heldout)
    train_bpe([text_file.read_text()], 270).save(tmp_path / "out" / "tokenizer")
    (tmp_path / "out" / "tokenizer" / "byte_tokenizer.json").unlink()
    with pytest.raises(ValueError, match="was made with tokenizer"):
        open_tokenized(tmp_path / "out")


def test_a_tokenizer_is_trained_on_the_training_part_and_says_so(
    text_file: Path, tmp_path: Path
) -> None:
    trained = train_tokenizer(str(text_file), 264, tmp_path / "t", digits="singly")
    train_text = text_file.read_text()[:1800]
    assert trained.fingerprint == train_bpe([train_text], 264, digits="singly").fingerprint
    assert load_tokenizer(tmp_path / "t").fingerprint == trained.fingerprint
    facts = json.loads((tmp_path / "t" / "training.json").read_text())
    assert facts["sha256_text"] == hashlib.sha256(train_text.encode()).hexdigest()
    assert (facts["vocab_size"], facts["digits"]) == (264, "singly")
