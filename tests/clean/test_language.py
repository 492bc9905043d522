"""Languages are known without a network."""

import pytest

from transnormer.clean.rules.language import UNKNOWN, identify


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "It is a truth that there are languages which he has not seen in this book."),
        ("zh", "线性注意力把序列的计算量降到线性，推理时的状态大小不变。"),
        ("ja", "これは日本語の文章です。言語を見分けます。"),
        ("ko", "이것은 한국어 문장입니다. 언어를 구별합니다."),
        ("de", "In der Zwischenzeit hatte der Maulwurfsfänger all seine Schlauheit aufgeboten."),
        ("fr", "Pendant ce temps, le chat dormait sur la table de la cuisine avec les enfants."),
        ("ru", "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему."),
        (UNKNOWN, "123 --- 456"),
    ],
)
def test_languages_are_told_apart(language: str, text: str) -> None:
    assert identify(text) == language
