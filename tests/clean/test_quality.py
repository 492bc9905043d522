"""Measures of a text against plain Python, and the thresholds that use them."""

from collections import Counter

import pytest
from clean_cases import prose

from transnormer.clean.config import make_clean_config
from transnormer.clean.presets import PRESETS
from transnormer.clean.rules.quality import Measures, Quality, why_drop


def words_of(text: str) -> list[str]:
    return text.lower().replace(".", "").split()


def grams(words: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]


TEXT = "\n".join(
    [prose(1, 60), "one line again and again and again", prose(1, 30), "one line again"]
)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_share_of_the_commonest_ngram(size: int) -> None:
    words = words_of(TEXT)
    counts = Counter(grams(words, size))
    most = max(counts.values())
    total = sum(map(len, words))
    shares = {n * len("".join(gram)) / total for gram, n in counts.items() if n == most}
    assert any(Measures(TEXT).top_ngram_share(size) == pytest.approx(share) for share in shares)


@pytest.mark.parametrize("size", [5, 7, 10])
def test_the_share_of_characters_in_ngrams_that_stood_before(size: int) -> None:
    words = words_of(TEXT)
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for start, gram in enumerate(grams(words, size)):
        if gram in seen:
            covered.update(range(start, start + size))
        seen.add(gram)
    assert covered
    expected = sum(len(words[i]) for i in covered) / sum(map(len, words))
    assert Measures(TEXT).duplicate_ngram_share(size) == pytest.approx(expected)


def test_duplicates_count_what_stood_before() -> None:
    assert Measures("").duplicates(["aa", "b", "aa", "aa"]) == (0.5, pytest.approx(4 / 7))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (prose(3), None),
        ("a few words", "min_words"),
        ("word " * 200, "min_distinct_words"),
        (
            "\n".join(
                f"worker {n} finished the job of today in {n + 3} seconds" for n in range(40)
            ),
            "max_template_lines",
        ),
        ("\n".join(["the same line once more"] * 40), "max_duplicate_lines"),
        (" ".join(f"{n}.{n + 1}," for n in range(200)), "min_letters"),
        (
            "xkcdqwrt zzvbnmkl qwrtpsdf " * 5 + "hjklmnbv cxzsdfgh plmkjnbh " * 30,
            "max_unplausible_words",
        ),
        ("9fab86dcea1884cffdbe 9adfeaaec55adafa3bffceb " * 30, "max_unplausible_words"),
        ("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。白日依山尽，黄河入海流。" * 1, None),
    ],
)
def test_the_papers_preset_names_why(text: str, reason: str | None) -> None:
    assert why_drop(Measures(text), Quality(**PRESETS["paper"]), "en") == reason


@pytest.mark.parametrize(
    ("preset", "text", "reason"),
    [
        ("gopher", "ab " * 60, "mean_word_length"),
        ("gopher", "\n".join(f"- {prose(n, 5)}" for n in range(12)), "max_bullet_lines"),
        ("gopher", "lavender mixture " * 40, "min_stop_words"),
        ("c4", prose(1), None),
        ("c4", prose(1) + " lorem ipsum.", "forbid"),
        ("c4", "One sentence only", "min_sentences"),
        ("fineweb", "\n".join(prose(1, 300).replace(".", "").split("\n")), "min_terminal_lines"),
    ],
)
def test_published_presets_drop_what_they_were_made_for(
    preset: str, text: str, reason: str | None
) -> None:
    assert why_drop(Measures(text), Quality(**PRESETS[preset]), "en") == reason


def test_a_threshold_of_the_file_replaces_the_presets() -> None:
    tables = {"input": {"path": "x"}, "output": {"dir": "y"}, "preset": "gopher"}
    config = make_clean_config({**tables, "quality": {"min_words": 3}})
    assert config.quality.min_words == 3
    assert config.quality.max_bullet_lines == PRESETS["gopher"]["max_bullet_lines"]


def test_every_threshold_of_a_preset_is_known() -> None:
    for values in PRESETS.values():
        Quality(**values)
