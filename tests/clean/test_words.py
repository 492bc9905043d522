"""Words, shingles, and their Jaccard index, against sets of strings."""

import re

import numpy as np
import pytest
from clean_cases import edited, prose

from transnormer.clean.words import jaccard, shingle_set, shingles, split_words


def pieces(text: str) -> list[str]:
    words = split_words(text)
    ends = words.starts + words.lengths
    return [text[a:b] for a, b in zip(words.starts, ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" .,!\n", []),
        ("word", ["word"]),
        ("  One, two;three 4th", ["One", "two", "three", "4th"]),
        ("naïve café", ["naïve", "café"]),
        ("线性attention很快", ["线", "性", "attention", "很", "快"]),
        ("𠀀a", ["𠀀", "a"]),
    ],
)
def test_words_are_runs_of_letters_and_single_han_characters(
    text: str, expected: list[str]
) -> None:
    assert pieces(text) == expected


def test_case_and_punctuation_do_not_change_hashes() -> None:
    assert np.array_equal(split_words("One, TWO!").hashes, split_words("one two").hashes)


def test_different_words_have_different_hashes() -> None:
    words = [a + b + c for a in "abcde" for b in "abcde" for c in "abcde"]
    assert len(np.unique(split_words(" ".join(words)).hashes)) == len(words)


def test_the_order_of_words_changes_a_shingle() -> None:
    assert shingles(split_words("a b").hashes, 2) != shingles(split_words("b a").hashes, 2)


def test_a_short_text_is_one_shingle_and_an_empty_one_none() -> None:
    assert len(shingles(split_words("a b").hashes, 5)) == 1
    assert len(shingles(split_words("").hashes, 5)) == 0


@pytest.mark.parametrize("changes", [0, 1, 5, 40])
def test_jaccard_is_that_of_the_sets_of_word_tuples(changes: int) -> None:
    first = prose(1)
    second = edited(first, 2, changes)

    def oracle(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    a, b = oracle(first), oracle(second)
    exact = len(a & b) / len(a | b)
    assert jaccard(shingle_set(first, 5), shingle_set(second, 5)) == exact


def test_jaccard_of_nothing_with_nothing_is_one() -> None:
    assert jaccard(shingle_set("", 5), shingle_set("", 5)) == 1.0
