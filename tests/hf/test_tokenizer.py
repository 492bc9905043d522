"""Tokenizers beside models, read by AutoTokenizer without any code of their directories."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from data_cases import sentencepiece_model
from decoder_cases import make_model
from transformers import AutoTokenizer

import transnormer.hf
from transnormer.data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from transnormer.models import checkpoint

TEXTS = ["the quick fox", "A line.\nAnother  line", "你好 ÿ ☃", "", " leading"]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the released ones: model, SentencePiece file, code that must not run."""
    directory = tmp_path_factory.mktemp("released") / "model"
    checkpoint.save(make_model(), directory, layout="released")
    (directory / "tokenizer.model").write_bytes(
        sentencepiece_model(model_type="bpe", byte_fallback=True)
    )
    table = {
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]},
        "tokenizer_class": "BaiChuanTokenizer",
        "add_bos_token": False,
        "unk_token": {"__type": "AddedToken", "content": "<unk>", "normalized": True},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(table))
    (directory / "tokenization_baichuan.py").write_text("raise SystemExit('remote code ran')\n")
    return directory


def test_a_released_tokenizer_gives_the_ids_of_sentencepiece(released: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(released)
    assert type(tokenizer) is transnormer.hf.BaiChuanTokenizer
    plain = sentencepiece.SentencePieceProcessor(str(released / "tokenizer.model"))
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == plain.encode(text)
        assert tokenizer.decode(ids) == plain.decode(ids)


def test_begin_and_end_are_added_where_they_are_wanted(released: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(released, add_bos_token=True, add_eos_token=True)
    plain = AutoTokenizer.from_pretrained(released)
    ids = plain("the fox").input_ids
    assert tokenizer("the fox").input_ids == [1, *ids, 2]
    assert tokenizer("the fox", "the fox").input_ids == [1, *ids, 2, 1, *ids, 2]
    found = tokenizer("the fox", return_special_tokens_mask=True)
    assert found.special_tokens_mask == [1, *[0] * len(ids), 1]
    assert tokenizer.decode([1, *ids, 2]) == "<s>the fox</s>"
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == "the fox"


def test_the_class_of_a_released_directory_is_the_default(released: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        (tmp_path / name).write_bytes((released / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is transnormer.hf.BaiChuanTokenizer
    assert tokenizer("the").input_ids[0] == 1


def test_a_saved_tokenizer_loads_again(released: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(released, pad_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((released / "config.json").read_bytes())
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>the fox ☃"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.pad_token_id == 0
    assert len(again) == len(tokenizer) == tokenizer.vocab_size + 1


def saved(directory: Path, tokenizer: Any) -> Path:
    """A decoder with a tokenizer beside it."""
    checkpoint.save(make_model(), directory)
    tokenizer.save(directory)
    return directory


def test_a_trained_tokenizer_gives_its_ids(tmp_path: Path) -> None:
    own = train_bpe(["the quick brown fox jumps over the lazy dog"] * 3, vocab_size=280)
    directory = saved(tmp_path / "model", own)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == own.encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (own.bos_id, own.eos_id)
    assert tokenizer.pad_token_id == own.pad_id


def test_a_sentencepiece_file_beside_a_decoder_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_model(model_type="bpe", byte_fallback=True))
    directory = saved(tmp_path / "model", load_tokenizer(file))
    assert type(AutoTokenizer.from_pretrained(directory)) is transnormer.hf.BaiChuanTokenizer


def test_a_tokenizer_of_bytes_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", ByteTokenizer())
    with pytest.raises(NotImplementedError, match="is no format of transformers"):
        AutoTokenizer.from_pretrained(directory)


def test_a_batch_is_padded_on_the_side_that_is_asked_for(released: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(released, pad_token="<unk>", padding_side="left")
    batch = tokenizer(["the", "the fox"], padding=True, return_tensors="pt")
    assert batch.attention_mask[0, 0] == 0
    assert bool((batch.input_ids[batch.attention_mask == 0] == 0).all())
    decoded = tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True)
    assert decoded[1] == "the fox"
