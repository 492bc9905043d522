"""Tokenizers and small corpora that several tests of this folder use."""

from pathlib import Path

import pytest
from data_cases import (
    TEXT,
    llama_style_json,
    numbered,
    sentencepiece_model,
    small_ranks,
    with_nfkc,
)

from transnormer.data import ByteTokenizer, TokenSource, write_shards
from transnormer.data.tokenizers import (
    BpeTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    train_bpe,
)


@pytest.fixture(scope="session")
def all_tokenizers() -> dict[str, Tokenizer]:
    """One tokenizer of each kind that is read, by name."""
    bpe = train_bpe([TEXT], 400)
    return {
        "bytes": ByteTokenizer(),
        "bpe": bpe,
        "bpe-nfkc": BpeTokenizer(with_nfkc(bpe._content)),
        "llama-json": BpeTokenizer(llama_style_json()),
        "sentencepiece": SentencePieceTokenizer(
            sentencepiece_model(
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
            )
        ),
        "sentencepiece-nfkc": SentencePieceTokenizer(sentencepiece_model()),
        "sentencepiece-unigram": SentencePieceTokenizer(sentencepiece_model(model_type="unigram")),
        "tiktoken": TiktokenTokenizer(
            small_ranks(), r"\s?\S+|\s", {"<|endoftext|>": 300, "<pad>": 301}
        ),
    }


TOKENIZER_NAMES = [
    "bytes",
    "bpe",
    "bpe-nfkc",
    "llama-json",
    "sentencepiece",
    "sentencepiece-nfkc",
    "sentencepiece-unigram",
    "tiktoken",
]


@pytest.fixture(params=TOKENIZER_NAMES)
def tokenizer(request: pytest.FixtureRequest, all_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    return all_tokenizers[request.param]


@pytest.fixture
def source(tmp_path: Path) -> TokenSource:
    """Five documents of bytes in two shards: 60 tokens with their ends."""
    write_shards(numbered([7, 20, 1, 18, 9]), ByteTokenizer(), tmp_path / "shards", shard_tokens=28)
    return TokenSource(tmp_path / "shards")
