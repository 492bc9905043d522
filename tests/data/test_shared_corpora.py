"""Real corpora, end to end: tokens and bytes add up, every text comes back."""

from pathlib import Path

import pytest
from data_cases import every_window

from transnormer.data import (
    label_bytes,
    open_tokenized,
    read_documents,
    token_lengths,
    tokenize_corpus,
)


@pytest.mark.parametrize(
    ("name", "tokenizer", "train_bytes", "heldout_bytes"),
    [
        ("tinyshakespeare.txt.xz", "bytes", 1_003_854, 111_540),
        ("zh_val.jsonl.xz", "bpe:1024", None, None),
    ],
)
def test_a_corpus_is_tokenised_without_loss(
    name: str,
    tokenizer: str,
    train_bytes: int | None,
    heldout_bytes: int | None,
    shared_dir: Path,
    tmp_path: Path,
) -> None:
    path = shared_dir / "data" / name
    corpus = tokenize_corpus(str(path), tokenizer, tmp_path / "out")
    assert corpus.heldout is not None
    if train_bytes is not None:
        assert (corpus.train.num_bytes, corpus.heldout.num_bytes) == (train_bytes, heldout_bytes)
    texts = [document.text for document in read_documents(str(path))]
    assert corpus.train.num_bytes + corpus.heldout.num_bytes == sum(
        len(text.encode()) for text in texts
    )
    if len(texts) > 1:
        decoded = {
            corpus.tokenizer.decode(tokens)
            for split in ("train", "heldout")
            for _, _, tokens in corpus.open(split).documents()
        }
        assert decoded == set(texts)
    lengths = token_lengths(corpus.tokenizer)
    heldout = open_tokenized(tmp_path / "out").open("heldout")
    batches = every_window(heldout, seq=256, packing="documents")
    counted = sum(label_bytes(batch, lengths, corpus.tokenizer) for batch in batches)
    assert counted == corpus.heldout.num_bytes
