"""Edits of signs: what they change, and what they leave."""

import random

import pytest
from ftfy.badness import badness, is_bad

from transnormer.clean.rules import text as signs


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("the sessionâ€™s cafÃ© is open", "the session’s café is open"),
        ("“kept” and Ã©tÃ©", "“kept” and été"),
        ("你好，世界".encode().decode("cp1252"), "你好，世界"),
    ],
)
def test_wrongly_decoded_text_is_repaired(wrong: str, right: str) -> None:
    assert signs.suspect(wrong)
    assert signs.repair_encoding(wrong) == (right, 1)


@pytest.mark.parametrize("text", ["plain", "“quoted” — naïve café…", "你好，世界", "Ça été où?"])
def test_well_decoded_text_stays(text: str) -> None:
    assert signs.repair_encoding(text) == (text, 0)


@pytest.mark.parametrize("seed", range(20))
def test_garbled_places_are_counted_as_ftfy_counts_them_in_the_whole_text(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [
        "Ã©",
        "â€™",
        " Â ",
        "œ",
        "a",
        ". ",
        "\n",
        "plain words here, ",
        "×²",
        "Ц",
        "ГўВЂВ™ x",
        "å",
    ]
    text = "".join(rng.choices(pieces, k=60))
    assert signs.garbled(text) == 1000.0 * badness(text) / len(text)
    assert signs.is_garbled(text) == is_bad(text)


def test_characters_that_show_nothing_go() -> None:
    text = "a\u200bb\ufeffc\u202ed\u00ade\x00f\ufffdg"
    assert signs.remove_controls(text) == ("abcdefg", 6)


def test_joiners_stay_where_they_mean_something() -> None:
    persian = "می\u200cخواهم"
    assert signs.remove_controls(persian)[0] == persian
    assert signs.remove_controls("in\u200dteger")[0] == "integer"


def test_line_ends_spaces_and_composition_become_uniform() -> None:
    assert signs.remove_controls("a\r\nb\rc\u2028d\u00a0e\u0301")[0] == "a\nb\nc\nd é"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("see https://example.org/a?b=c, then", "see , then"),
        ("(http://example.org/x).", "()."),
        ("at www.example.com/y now", "at  now"),
        ("参见http://example.org/路径。", "参见路径。"),
        ("no address: www. or a://b", "no address: www. or a://b"),
    ],
)
def test_addresses_go_and_the_punctuation_behind_them_stays(text: str, clean: str) -> None:
    assert signs.remove_urls(text)[0] == clean


def test_tags_go_and_comparisons_stay() -> None:
    text = '<p class="x">if a < b and c > d then Vec<u8></p><!-- note -->&amp;'
    assert signs.remove_tags(text) == ("if a < b and c > d then Vec<u8>&", 4)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("wait,,,, what!!!!", "wait, what!"),
        ("end......", "end."),
        ("an ellipsis... stays", "an ellipsis... stays"),
        ("好！！！！", "好！"),
        ("a.. b", "a.. b"),
    ],
)
def test_repeated_punctuation_becomes_one(text: str, clean: str) -> None:
    assert signs.collapse_punctuation(text)[0] == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("1,234,567 people", "1234567 people"),
        ("7 019 670 units", "7019670 units"),
        ("4471408.00 exactly", "4471408 exactly"),
        ("1,23 and 12,3456", "1,23 and 12,3456"),
        ("in 1996, 200 came", "in 1996, 200 came"),
        ("version 2.00.1", "version 2.00.1"),
        ("3.14 and 1.000", "3.14 and 1.000"),
        ("1,234.50", "1234.50"),
    ],
)
def test_numbers_have_one_form(text: str, clean: str) -> None:
    assert signs.plain_numbers(text)[0] == clean


def test_full_width_letters_and_digits_narrow_and_punctuation_stays() -> None:
    assert signs.narrow("３２，Ａｂ。") == ("32，Ab。", 4)


def test_the_share_of_addresses_counts_no_spaces() -> None:
    assert signs.url_share("ab   http://example.org") == pytest.approx(18 / 20)
