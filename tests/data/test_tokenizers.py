"""Tokenizers: exact round trips, the ids of the reference packages, saving, fingerprints."""

import base64
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from data_cases import (
    HARD_TEXTS,
    LINES,
    TEXT,
    llama_style_json,
    sentencepiece_model,
    small_ranks,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transnormer.data import load_tokenizer, start_id, token_lengths
from transnormer.data.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    train_bpe,
)
from transnormer.data.tokenizers.bpe import add_start

# The tokenizer is the same for every example.
FAST = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS)
def test_hard_texts_come_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@FAST
@given(text=st.text(max_size=40) | st.text(alphabet=" \u2581\nthea的", max_size=20))
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_text_becomes_fewer_tokens_than_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    longest = len(TEXT.encode()) + len(tokenizer.prefix)
    assert len(ids) == longest if isinstance(tokenizer, ByteTokenizer) else len(ids) < longest


@FAST
@given(texts=st.lists(st.text(max_size=10), max_size=4))
def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_token_lengths_add_up_to_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    lengths = token_lengths(tokenizer)
    assert len(lengths) == tokenizer.vocab_size
    for text in LINES:
        total = lengths[tokenizer.encode(text)].sum()
        assert total == len(text.encode()) + len(tokenizer.prefix)


def test_special_tokens_have_no_bytes_and_are_never_made_from_text(tokenizer: Tokenizer) -> None:
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} - {None}
    assert specials
    assert all(tokenizer.token_bytes(i) == b"" for i in specials)
    assert not specials & set(tokenizer.encode(HARD_TEXTS["special-names"]))
    assert tokenizer.decode([*specials, *tokenizer.encode("the"), *specials]).strip() == "the"


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, Tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "prefix"):
        assert getattr(loaded, name) == getattr(tokenizer, name)


def test_fingerprints_differ(all_tokenizers: dict[str, Tokenizer]) -> None:
    fingerprints = {tokenizer.fingerprint for tokenizer in all_tokenizers.values()}
    assert len(fingerprints) == len(all_tokenizers)
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)


def test_byte_tokenizer_ids_are_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("aé") == [0x61, 0xC3, 0xA9]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (256, 257, 258)


def test_documents_start_with_bos_else_with_eos() -> None:
    assert start_id(ByteTokenizer()) == 257
    ranks = small_ranks()
    assert start_id(TiktokenTokenizer(ranks, r"\s|\S+", {"</s>": 300, "<s>": 301})) == 301
    assert start_id(TiktokenTokenizer(ranks, r"\s|\S+", {"<|endoftext|>": 300})) == 300
    with pytest.raises(ValueError, match="neither bos nor eos"):
        start_id(TiktokenTokenizer(ranks, r"\s|\S+", {}))


class TestTrainedBpe:
    def test_training_twice_gives_the_same(self) -> None:
        assert train_bpe([TEXT], 350).fingerprint == train_bpe([TEXT], 350).fingerprint

    def test_the_size_is_as_asked(self) -> None:
        tokenizer = train_bpe([TEXT], 333)
        assert tokenizer.vocab_size == 333
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)

    @pytest.mark.parametrize(("digits", "longest"), [("singly", 1), ("threes", 3), ("whole", 5)])
    def test_digits_are_cut_as_asked(self, digits: str, longest: int) -> None:
        tokenizer = train_bpe([TEXT, "x 12345 " * 99], 400, digits=digits)
        pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode("12345")]
        assert max(len(piece) for piece in pieces) == longest

    def test_a_text_without_known_characters_is_bytes(self) -> None:
        tokenizer = train_bpe(["only letters here " * 9], 265)
        assert [tokenizer.token_bytes(i) for i in tokenizer.encode("é")] == [b"\xc3", b"\xa9"]

    def test_ids_are_those_of_the_library(self, all_tokenizers: dict[str, Tokenizer]) -> None:
        ours = all_tokenizers["bpe"]
        assert isinstance(ours, BpeTokenizer)
        theirs = tokenizers.Tokenizer.from_str(ours._content)
        assert ours.encode(TEXT) == theirs.encode(TEXT).ids
        assert theirs.decode(ours.encode(TEXT)) == TEXT


class TestTokenizerJson:
    def test_pieces_have_the_ids_of_the_library(self) -> None:
        theirs = tokenizers.Tokenizer.from_str(llama_style_json())
        theirs.no_truncation()
        ours = BpeTokenizer(llama_style_json())
        for text in ("the the  atheba", "x的 the", " the"):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids

    def test_truncation_in_the_file_is_ignored(self) -> None:
        assert len(BpeTokenizer(llama_style_json()).encode("b" * 50)) == 51

    def test_roles_come_from_the_file_beside(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text(llama_style_json())
        roles = {"bos_token": {"content": "</s>"}, "eos_token": "<s>", "pad_token": None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
        loaded = load_tokenizer(tmp_path)
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (2, 1, None)

    def test_word_pieces_are_refused(self, tmp_path: Path) -> None:
        word_pieces = tokenizers.Tokenizer(
            tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
        )
        word_pieces.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(NotImplementedError, match="WordPiece.*expected byte-level BPE"):
            load_tokenizer(tmp_path)


class TestSentencePiece:
    @pytest.mark.parametrize("model_type", ["bpe", "unigram"])
    def test_ids_are_those_of_the_package_where_its_normaliser_is_idle(
        self, model_type: str
    ) -> None:
        model = sentencepiece_model(model_type=model_type)
        theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
        ours = SentencePieceTokenizer(model)
        for text in ("the text is what", "def rotate(x, angle=0.5):", "线性注意力", "café"):
            assert ours.encode(text) == theirs.encode(text)

    def test_text_that_the_normaliser_would_change_keeps_its_characters(self) -> None:
        model = sentencepiece_model()
        theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
        ours = SentencePieceTokenizer(model)
        assert theirs.decode(theirs.encode("Ａ  b\n")) == "A b"
        assert ours.decode(ours.encode("Ａ  b\n")) == "Ａ  b\n"

    def test_a_space_sign_in_the_text_is_not_a_space(self) -> None:
        ours = SentencePieceTokenizer(sentencepiece_model(add_dummy_prefix=False))
        assert ours.encode("a b") != ours.encode("a\u2581b")

    def test_without_byte_fallback_a_foreign_character_is_refused(self) -> None:
        ours = SentencePieceTokenizer(sentencepiece_model(byte_fallback=False, vocab_size=200))
        assert ours.decode(ours.encode("the text")) == "the text"
        for text in ("the \U0001f600", "a\u2581b"):
            with pytest.raises(ValueError, match="byte fallback"):
                ours.encode(text)

    def test_space_after_the_word_is_refused(self) -> None:
        model = sentencepiece_model(treat_whitespace_as_suffix=True)
        with pytest.raises(NotImplementedError, match="treat_whitespace_as_suffix=false"):
            SentencePieceTokenizer(model)

    def test_the_saved_file_is_the_model_itself(self, tmp_path: Path) -> None:
        model = sentencepiece_model()
        SentencePieceTokenizer(model).save(tmp_path)
        assert (tmp_path / "tokenizer.model").read_bytes() == model


class TestTiktoken:
    def test_a_published_file_gets_its_pattern_and_special_tokens_by_name(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "cl100k_base.tiktoken"
        lines = [base64.b64encode(t) + b" %d" % rank for t, rank in small_ranks().items()]
        path.write_bytes(b"\n".join(lines))
        tokenizer = load_tokenizer(path)
        assert tokenizer.eos_id == 100257
        assert tokenizer.vocab_size == 100277
        pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode(" the the")]
        assert pieces == [b" the", b" the"]
        # The pattern cuts digits in threes.
        assert tokenizer.decode(tokenizer.encode("12345 的")) == "12345 的"

    @pytest.mark.parametrize("name", ["gpt2", "r50k_base", "p50k_base", "o200k_base", "qwen"])
    @pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS)
    def test_every_published_pattern_covers_every_text(
        self, name: str, text: str, tmp_path: Path
    ) -> None:
        path = tmp_path / f"{name}.tiktoken"
        lines = [base64.b64encode(t) + b" %d" % rank for t, rank in small_ranks().items()]
        path.write_bytes(b"\n".join(lines))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_a_pattern_that_leaves_text_out_is_noticed(self) -> None:
        tokenizer = TiktokenTokenizer(small_ranks(), r"\w+", {"<|endoftext|>": 300})
        with pytest.raises(ValueError, match="cannot express the text near byte 3"):
            tokenizer.encode("the the")

    def test_unused_ids_have_no_bytes(self) -> None:
        tokenizer = TiktokenTokenizer(small_ranks(), r"\s|\S+", {"<|endoftext|>": 300})
        assert tokenizer.vocab_size == 301
        assert tokenizer.token_bytes(290) == b""


TEMPLATES = {
    "none": None,
    "bytes": {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    },
    "start": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "end": {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
    },
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["pieces", "bytes"])
def test_other_readers_begin_a_text_with_the_start_token_and_no_more(
    tmp_path: Path, kind: str, template: str
) -> None:
    if kind == "pieces":
        data = json.loads(llama_style_json()) | {"truncation": None}
    else:
        train_bpe([TEXT], vocab_size=280).save(tmp_path)
        data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["post_processor"] = TEMPLATES[template]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    before = load_tokenizer(tmp_path)
    add_start(tmp_path, "<s>", 1)
    after, theirs = (
        load_tokenizer(tmp_path),
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    assert theirs.encode("the tea").ids == [1, *before.encode("the tea")]
    assert after.encode("the tea") == before.encode("the tea")
    assert (after.fingerprint == before.fingerprint) is (template != "end")


@pytest.mark.parametrize(
    ("package", "build"),
    [
        ("sentencepiece", lambda: SentencePieceTokenizer(b"")),
        ("tiktoken", lambda: TiktokenTokenizer(small_ranks(), r"\S|\s", {})),
    ],
    ids=["sentencepiece", "tiktoken"],
)
def test_a_missing_package_is_named_with_its_command(
    package: str, build: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=rf"needs {package}; run: pip install 'transnormer\["):
        build()
