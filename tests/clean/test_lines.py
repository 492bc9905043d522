"""Lines of pages and scans go; lines of texts stay."""

import pytest

from transnormer.clean.rules.lines import is_navigation, remove_lines


def remove(text: str) -> str:
    return remove_lines(text, navigation=True, watermarks=True)[0]


@pytest.mark.parametrize(
    "line",
    [
        "Home » Shop » Cart",
        "News | Events | Login",
        "Follow us on Mastodon",
        "Please log in to comment",
        "© 2019-2023 Some Company. All rights reserved.",
        "This site uses cookies to work better.",
        "Recent articles",
        "12 comments",
        "上一篇：春天",
        "版权所有 某某公司",
    ],
)
def test_lines_of_pages_are_known(line: str) -> None:
    assert is_navigation(line)


@pytest.mark.parametrize(
    "line",
    [
        "He read more than he wrote.",
        "The home page and the next page differ in their contents, as the log says.",
        "| Home | About |",
        "Contact the next of kin.",
        "Copyright law is old.",
        "See also",
        "and/or",
        "12 men",
        "他阅读了全文。",
    ],
)
def test_lines_of_texts_are_not(line: str) -> None:
    assert not is_navigation(line) or remove(line) == line


@pytest.mark.parametrize(
    "mark",
    [
        "Scanned at the library of example.org",
        "*** evaluation copy ***",
        "本书来自 www.example.com 更多电子书",
        "You found this at books.example.com",
    ],
)
def test_a_mark_that_stands_three_times_goes(mark: str) -> None:
    text = "\n".join(f"A paragraph, number {n}.\n\n{mark}\n" for n in range(3))
    assert mark not in remove(text)
    assert remove(text).count("A paragraph") == 3


def test_a_line_that_repeats_without_a_site_stays() -> None:
    text = "\n".join(["And the bell rang once again.", "A verse.", "Another."] * 3)
    assert remove(text) == text


def test_code_is_exempt() -> None:
    text = "```\nHome | About | Login\n```"
    assert remove(text) == text
