"""Whole-document rules: measures of a text, and the thresholds that drop it.

The measures of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A), C4 (Raffel et al. 2020,
arXiv:1910.10683, section 2.2) and FineWeb (Penedo et al. 2024, arXiv:2406.17557) are here under one
configuration, so that a published set of rules is a set of numbers. A threshold of None is off.
Ours, which catch what those let pass: `unplausible_words` (strings of random letters, keys),
`min_distinct_words` (spam from a small vocabulary), `template_lines` (logs: lines that differ in
their digits only), `min_letters`, `max_url_share` and `max_garbled`.
"""

import re
from collections import Counter
from functools import cached_property, lru_cache

import numpy as np

from transnormer.clean.words import Words, code_points, is_digit, shingles, split_codes
from transnormer.config import Config

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_TERMINAL = tuple(".!?\"'。！？”’…:;」』》")
_SYMBOLS = re.compile(r"#|\.\.\.|…")
_BULLET = re.compile(r"\s*[-*•●▪‣·]\s")
_SENTENCE = re.compile(r"[.!?。！？]+[\"'”’)\]」』]*(?:\s|\Z|(?<=[。！？]))")
_TOKEN = re.compile(r"\S+")
_LATIN = re.compile("[A-Za-z0-9\u00c0-\u024f]{4,}")
_UNPLAUSIBLE = re.compile(
    r"\w{31,}"
    r"|[b-df-hj-np-tv-xzB-DF-HJ-NP-TV-XZ]{4,}\Z"
    r"|[^\W_]*?[b-df-hj-np-tv-xzB-DF-HJ-NP-TV-XZ]{6,}"
    r"|(?=[^\W_]*[A-Za-z])(?:[A-Za-z]*\d+){2,}[A-Za-z]+"
    r"|[a-f]{0,40}\d+[a-f]+\d*\Z"
    r"|\w*?[a-z][A-Z]{2,}[a-z]+[A-Z]"
)
_DIGITS = re.compile(r"\d+|\b[0-9a-f]*\d[0-9a-f]*\b")
_LETTERS = re.compile(r"[^\W\d_]")
_ROWS = 8
_WINDOW = 100
_SAMPLED = 2000


class Quality(Config):
    """Thresholds of whole documents; None switches one off. Shares are of 0 to 1.

    Attributes:
        min_words: fewer words and the text is too short; a Han character is a word.
        max_words: more words.
        min_mean_word_length: mean characters of a word, scripts without spaces left out.
        max_mean_word_length: the same, upper limit.
        max_symbols: `#` and ellipses a word.
        max_bullet_lines: share of lines that begin with a bullet.
        max_ellipsis_lines: share of lines that end with an ellipsis.
        min_alphabetic_words: share of words (between spaces) with a letter.
        min_stop_words: different ones of eight English function words; English texts only.
        max_duplicate_lines: share of lines that stood before.
        max_duplicate_paragraphs: share of paragraphs that stood before.
        max_duplicate_line_chars: share of characters in lines that stood before.
        max_duplicate_paragraph_chars: share of characters in paragraphs that stood before.
        max_top_ngram_chars: of the commonest 2-, 3-, 4-gram, share of the words' characters.
        max_duplicate_ngram_chars: of 5- to 10-grams that stood before, the same share.
        min_sentences: fewer sentences.
        min_terminal_lines: share of lines that end with a sign that ends a sentence.
        max_short_lines: share of lines of 30 characters or fewer.
        max_newlines_per_word: line ends a word.
        max_word_chars: longest run of characters that are no spaces.
        forbid: texts (lower case) that drop a document.
        min_letters: share of letters in the characters that are no spaces.
        max_unplausible_words: share of letters and digits in strings that no language has as words:
            random letters, keys, digests.
        min_distinct_words: different words in windows of 100, mean share.
        max_template_lines: share of lines that equal an earlier one but for digits.
        max_url_share: share of the characters in addresses, before these are removed.
        max_garbled: wrongly decoded places a thousand characters, after repair.
    """

    min_words: int | None = None
    max_words: int | None = None
    min_mean_word_length: float | None = None
    max_mean_word_length: float | None = None
    max_symbols: float | None = None
    max_bullet_lines: float | None = None
    max_ellipsis_lines: float | None = None
    min_alphabetic_words: float | None = None
    min_stop_words: int | None = None
    max_duplicate_lines: float | None = None
    max_duplicate_paragraphs: float | None = None
    max_duplicate_line_chars: float | None = None
    max_duplicate_paragraph_chars: float | None = None
    max_top_ngram_chars: tuple[float, float, float] | None = None
    max_duplicate_ngram_chars: tuple[float, float, float, float, float, float] | None = None
    min_sentences: int | None = None
    min_terminal_lines: float | None = None
    max_short_lines: float | None = None
    max_newlines_per_word: float | None = None
    max_word_chars: int | None = None
    forbid: tuple[str, ...] = ()
    min_letters: float | None = None
    max_unplausible_words: float | None = None
    min_distinct_words: float | None = None
    max_template_lines: float | None = None
    max_url_share: float | None = None
    max_garbled: float | None = None


@lru_cache(maxsize=1 << 16)
def _unplausible_length(word: str) -> int:
    """Characters of a string that no language has as a word; 0 of a word."""
    return len(word) if _UNPLAUSIBLE.match(word) else 0


class Measures:
    """What the rules look at, each measured when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def codes(self) -> np.ndarray:
        """Code points, uint32 [characters]."""
        return code_points(self.text)

    @cached_property
    def words(self) -> Words:
        """Words as `clean.words` splits them."""
        return split_codes(self.codes)

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without the spaces around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def with_digits(self) -> np.ndarray:
        """Numbers of the lines, blank ones counted, that hold a digit, int64 [lines]."""
        digits = np.flatnonzero(is_digit(self.codes))
        if not len(digits):
            return digits
        return np.unique(np.searchsorted(np.flatnonzero(self.codes == ord("\n")), digits))

    @cached_property
    def tokens(self) -> list[str]:
        """What stands between spaces."""
        return _TOKEN.findall(self.text)

    @property
    def num_words(self) -> int:
        """Number of words."""
        return len(self.words.hashes)

    def mean_word_length(self) -> float | None:
        """Mean characters of the words of scripts with spaces; None without any."""
        lengths = self.words.lengths[~self.words.alone]
        return float(lengths.mean()) if len(lengths) else None

    def share_of_lines(self, count: int) -> float:
        """count as a share of the lines."""
        return count / len(self.lines) if self.lines else 0.0

    def duplicates(self, pieces: list[str]) -> tuple[float, float]:
        """Shares of pieces, and of their characters, that stood before."""
        if not pieces:
            return 0.0, 0.0
        repeated = sum(count - 1 for count in Counter(pieces).values())
        chars = sum((count - 1) * len(piece) for piece, count in Counter(pieces).items())
        return repeated / len(pieces), chars / max(1, sum(map(len, pieces)))

    def top_ngram_share(self, size: int) -> float:
        """Share of the words' characters in the commonest n-gram; 0 where none stands twice."""
        grams = shingles(self.words.hashes, size)
        if self.num_words <= size:
            return 0.0
        _, first, counts = np.unique(grams, return_index=True, return_counts=True)
        best = int(counts.argmax())
        if counts[best] < 2:
            return 0.0
        length = int(self.words.lengths[first[best] : first[best] + size].sum())
        return int(counts[best]) * length / int(self.words.lengths.sum())

    def duplicate_ngram_share(self, size: int) -> float:
        """Share of the words' characters covered by n-grams that stood before."""
        if self.num_words <= size:
            return 0.0
        grams = shingles(self.words.hashes, size)
        _, first = np.unique(grams, return_index=True)
        again = np.ones(len(grams), dtype=bool)
        again[first] = False
        edges = np.zeros(self.num_words + 1, dtype=np.int64)
        np.add.at(edges, np.flatnonzero(again), 1)
        np.add.at(edges, np.flatnonzero(again) + size, -1)
        covered = np.cumsum(edges[:-1]) > 0
        return int(self.words.lengths[covered].sum()) / int(self.words.lengths.sum())

    def unplausible_words(self) -> float:
        """Share of the letters and digits that stand in strings no language has as words."""
        text, share = self.text, 1.0
        if len(text) > 3 * _SAMPLED:
            # Three places settle a share.
            middle = len(text) // 2
            share = 3 * _SAMPLED / len(text)
            text = " ".join((text[:_SAMPLED], text[middle : middle + _SAMPLED], text[-_SAMPLED:]))
        return sum(map(_unplausible_length, _LATIN.findall(text))) / max(
            1.0, share * int(self.words.lengths.sum())
        )

    def distinct_words(self) -> float:
        """Different words in windows of 100, mean share; 1 for less than one window."""
        windows = self.num_words // _WINDOW
        if not windows:
            return 1.0
        table = np.sort(self.words.hashes[: windows * _WINDOW].reshape(windows, _WINDOW), axis=1)
        return float(((table[:, 1:] != table[:, :-1]).sum(axis=1) + 1).mean()) / _WINDOW

    def template_lines(self) -> float:
        """Share of lines that equal an earlier one but for their digits."""
        if len(self.with_digits) < _ROWS:
            return 0.0
        lines = self.text.split("\n")
        shapes = Counter(_DIGITS.sub("0", lines[number].strip()) for number in self.with_digits)
        return self.share_of_lines(sum(count - 1 for count in shapes.values()))

    def letters(self) -> float:
        """Share of letters in the characters that are no spaces."""
        codes = self.codes
        solid = np.count_nonzero(codes > ord(" "))
        # Below the zero the difference wraps around.
        digits = np.count_nonzero(codes - np.uint32(ord("0")) <= 9)
        return (int(self.words.lengths.sum()) - digits) / solid if solid else 0.0


def why_drop(measures: Measures, limits: Quality, language: str) -> str | None:
    """Return the name of the first threshold that the text breaks, or None.

    Args:
        measures: of the cleaned text.
        limits: thresholds.
        language: of the text, as `language.identify` names it.
    """
    for check in (_length_rules, _sign_rules, _line_rules, _repetition_rules):
        reason = check(measures, limits, language)
        if reason is not None:
            return reason
    return None


def _outside(value: float | None, low: float | None, high: float | None) -> bool:
    return value is not None and (
        (low is not None and value < low) or (high is not None and value > high)
    )


def _length_rules(m: Measures, limits: Quality, language: str) -> str | None:
    if _outside(m.num_words, limits.min_words, None):
        return "min_words"
    if _outside(m.num_words, None, limits.max_words):
        return "max_words"
    if limits.max_word_chars is not None and not m.words.alone.any():
        longest = max(map(len, m.tokens), default=0)
        if longest > limits.max_word_chars:
            return "max_word_chars"
    if limits.min_sentences is not None and len(_SENTENCE.findall(m.text)) < limits.min_sentences:
        return "min_sentences"
    if limits.forbid:
        lower = m.text.lower()
        if any(phrase in lower for phrase in limits.forbid):
            return "forbid"
    return None


def _sign_rules(m: Measures, limits: Quality, language: str) -> str | None:
    if limits.min_letters is not None and m.letters() < limits.min_letters:
        return "min_letters"
    limit = limits.max_unplausible_words
    if limit is not None and m.unplausible_words() > limit:
        return "max_unplausible_words"
    low, high = limits.min_mean_word_length, limits.max_mean_word_length
    if (low is not None or high is not None) and _outside(m.mean_word_length(), low, high):
        return "mean_word_length"
    limit = limits.max_symbols
    if limit is not None and len(_SYMBOLS.findall(m.text)) > limit * max(1, len(m.tokens)):
        return "max_symbols"
    if limits.min_alphabetic_words is not None:
        with_letter = sum(_LETTERS.search(token) is not None for token in m.tokens)
        if with_letter < limits.min_alphabetic_words * len(m.tokens):
            return "min_alphabetic_words"
    if limits.min_stop_words is not None and language == "en":
        found = _STOP_WORDS.intersection(m.text.lower().split())
        if len(found) < limits.min_stop_words:
            return "min_stop_words"
    return None


def _line_rules(m: Measures, limits: Quality, language: str) -> str | None:
    counted = (
        ("max_bullet_lines", lambda line: _BULLET.match(line) is not None),
        ("max_ellipsis_lines", lambda line: line.endswith(("...", "…"))),
        ("max_short_lines", lambda line: len(line) <= 30),
    )
    for name, test in counted:
        limit = getattr(limits, name)
        if limit is not None and m.share_of_lines(sum(map(test, m.lines))) > limit:
            return name
    if limits.min_terminal_lines is not None:
        ended = sum(line.endswith(_TERMINAL) for line in m.lines)
        if m.share_of_lines(ended) < limits.min_terminal_lines:
            return "min_terminal_lines"
    limit = limits.max_newlines_per_word
    if limit is not None and m.text.count("\n") > limit * max(1, m.num_words):
        return "max_newlines_per_word"
    limit = limits.max_template_lines
    # The lines that could be of a template are counted first: most texts have few.
    if (
        limit is not None
        and m.share_of_lines(len(m.with_digits)) > limit
        and m.template_lines() > limit
    ):
        return "max_template_lines"
    return None


def _repetition_rules(m: Measures, limits: Quality, language: str) -> str | None:
    pairs = (
        ("line", m.lines, limits.max_duplicate_lines, limits.max_duplicate_line_chars),
        (
            "paragraph",
            [part.strip() for part in m.text.split("\n\n") if part.strip()],
            limits.max_duplicate_paragraphs,
            limits.max_duplicate_paragraph_chars,
        ),
    )
    for name, pieces, share_limit, chars_limit in pairs:
        if share_limit is None and chars_limit is None:
            continue
        share, chars = m.duplicates(pieces)
        if share_limit is not None and share > share_limit:
            return f"max_duplicate_{name}s"
        if chars_limit is not None and chars > chars_limit:
            return f"max_duplicate_{name}_chars"
    if limits.min_distinct_words is not None and m.distinct_words() < limits.min_distinct_words:
        return "min_distinct_words"
    for size, limit in enumerate(limits.max_top_ngram_chars or (), start=2):
        if m.top_ngram_share(size) > limit:
            return "max_top_ngram_chars"
    for size, limit in enumerate(limits.max_duplicate_ngram_chars or (), start=5):
        if m.duplicate_ngram_share(size) > limit:
            return "max_duplicate_ngram_chars"
    return None
