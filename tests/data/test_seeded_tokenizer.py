"""Seeded characters are one token each, and nothing else changes."""

import pytest
from train_cases import some_text

from transnormer.data.tokenizers import load_tokenizer, train_bpe
from transnormer.data.tokenizers.seeds import common_han

CHINESE = "线性注意力很快。线性注意力很好。" * 40


@pytest.fixture(scope="module")
def seeded():
    return train_bpe([CHINESE, some_text()], 7385, characters=common_han(6763))


@pytest.mark.parametrize(("count", "first", "last"), [(3755, "啊", "座"), (6763, "啊", "齄")])
def test_the_lists_are_those_of_the_standard(count: int, first: str, last: str) -> None:
    found = common_han(count)
    assert (len(found), len(set(found)), found[0], found[-1]) == (count, count, first, last)


def test_another_count_is_refused() -> None:
    with pytest.raises(ValueError, match="han is 100; expected 3755 or 6763"):
        common_han(100)


def test_every_seeded_character_is_one_token(seeded) -> None:
    assert [char for char in common_han(6763) if len(seeded.encode(char)) != 1] == []
    assert seeded.vocab_size == 7385


def test_words_are_still_learned(seeded) -> None:
    assert len(seeded.encode("线性注意力")) < 5
    plain = train_bpe([CHINESE, some_text()], 310)
    assert len(seeded.encode(some_text())) <= 1.1 * len(plain.encode(some_text()))


@pytest.mark.parametrize("text", ["线性 attention", "罕见字：𠀀龘", "emoji 🙂, \x00\xff", "中a文b"])
def test_every_text_comes_back(seeded, text: str) -> None:
    assert seeded.decode(seeded.encode(text)) == text


def test_a_seeded_tokenizer_is_saved_and_read(seeded, tmp_path) -> None:
    seeded.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("注意力") == seeded.encode("注意力")


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 3000; expected at least"):
        train_bpe([CHINESE, some_text()], 3000, characters=common_han(3755))
