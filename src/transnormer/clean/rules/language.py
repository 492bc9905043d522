"""Language of a text, without a network: scripts, common words, then py3langid's model.

English and Chinese, most of what this package is given, are known by their script and most common
words; only the rest costs a call of the model (py3langid, 97 languages, held in its wheel).
"""

import re
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

UNKNOWN = "und"
_SAMPLE = 2000
# A text with this share of English function words is English: other languages stay below 0.1.
_ENGLISH_SHARE = 0.2
_ENGLISH_WORDS = """
the of and to in a is that it for was on with as by this be are from at which or not have an his
they has but he she you we been were their its will would there if can when
"""
_ENGLISH = frozenset(_ENGLISH_WORDS.split())
_WORD = re.compile(r"[^\W\d_]+")
_HAN = re.compile("[\u3400-\u9fff\U00020000-\U000323af]+")
_KANA = re.compile("[\u3040-\u30ff]+")
_HANGUL = re.compile("[\uac00-\ud7af]+")


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def identify(text: str) -> str:
    """Return the ISO 639-1 code of a text's language; `und` where it has no letters.

    Read are 2,000 characters from its middle: heads and tails hold titles and notices.
    """
    start = max(0, (len(text) - _SAMPLE) // 2)
    sample = text[start : start + _SAMPLE]
    words = _WORD.findall(sample)
    if not words:
        return UNKNOWN
    if not sample.isascii():
        letters = sum(map(len, words))
        han, kana, hangul = (
            len(sample) - len(script.sub("", sample)) for script in (_HAN, _KANA, _HANGUL)
        )
        if kana > 0.1 * letters:
            return "ja"
        if hangul > 0.3 * letters:
            return "ko"
        if han > 0.3 * letters:
            return "zh"
    if sum(word.lower() in _ENGLISH for word in words) > _ENGLISH_SHARE * len(words):
        return "en"
    return _identifier().classify(sample[:600])[0]
