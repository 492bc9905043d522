"""Words and shingles of a text as arrays of hashes, without a Python loop over the words.

A word is a maximal run of letters, digits and marks; in scripts that are written without spaces
(Han, kana, Thai, Lao, Khmer, Burmese) every character is a word. Case and punctuation are ignored.
A word's hash is a polynomial of its folded code points modulo 2^64, mixed by the finalizer of
splitmix64; a shingle's hash is the same of its words. Two different words share a hash with a
probability of about 2^-64, which every count here neglects.
"""

import unicodedata
from functools import cache
from typing import NamedTuple

import numpy as np

SEPARATOR, LETTER, ALONE = 0, 1, 2
_CODE_POINTS = 0x110000
# Inclusive ranges of scripts without spaces.
_ALONE = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3005, 0x3007),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
# Beyond this one only planes of ideographs and of signs that no word is made of.
_LAST_LETTER = 0x1FFFF
_WEIGHTS = 64


class Words(NamedTuple):
    """The words of a text.

    Attributes:
        starts: int64 [words], the first code point of each.
        lengths: int64 [words], in code points.
        hashes: uint64 [words].
        alone: bool [words], whether it is a character of a script without spaces.
    """

    starts: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    alone: np.ndarray


class _Tables(NamedTuple):
    """By code point: its kind, what it counts in a hash (0: nothing), and whether it is a digit."""

    kinds: np.ndarray
    values: np.ndarray
    digits: np.ndarray
    weights: np.ndarray


@cache
def _tables() -> _Tables:
    kinds = np.zeros(_CODE_POINTS, dtype=np.uint8)
    digits = np.zeros(_CODE_POINTS, dtype=bool)
    values = np.arange(1, _CODE_POINTS + 1, dtype=np.uint64)
    for code in range(_LAST_LETTER + 1):
        char = chr(code)
        if char.isalnum() or unicodedata.category(char)[0] == "M":
            kinds[code] = LETTER
            lower = char.lower()
            digits[code] = char.isdecimal()
            if len(lower) == 1:
                values[code] = ord(lower) + 1
    for first, last in _ALONE:
        part = slice(first, last + 1)
        if first >= 0x20000:
            kinds[part] = ALONE
        else:
            kinds[part][kinds[part] == LETTER] = ALONE
    values[kinds == SEPARATOR] = 0
    weights = np.random.default_rng(1).integers(1, 1 << 63, _WEIGHTS, dtype=np.uint64) * 2 + 1
    return _Tables(kinds, values, digits, weights)


def code_points(text: str) -> np.ndarray:
    """Return the text's code points, uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): uint64 in, uint64 out, bijective."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def split_words(text: str) -> Words:
    """Split a text into words; see the module for what a word is."""
    return split_codes(code_points(text))


def split_codes(codes: np.ndarray) -> Words:
    """The same of a text's code points, uint32 [characters]."""
    tables = _tables()
    # `take` is five times as fast as an index of 32 bits.
    kinds = tables.kinds.take(codes)
    inside, alone = kinds == LETTER, kinds == ALONE
    begins, ends = alone.copy(), alone
    begins[:1] |= inside[:1]
    begins[1:] |= inside[1:] & ~inside[:-1]
    ends[-1:] |= inside[-1:]
    ends[:-1] |= inside[:-1] & ~inside[1:]
    starts = np.flatnonzero(begins)
    if not len(starts):
        nothing = np.zeros(0, dtype=np.int64)
        return Words(nothing, nothing, np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=bool))
    lengths = np.flatnonzero(ends) + 1 - starts
    # Every segment runs to the next word; what separates them is worth nothing.
    spans = np.diff(starts, append=len(codes))
    # A place counts modulo the number of weights, and so its lowest byte is enough.
    places = np.arange(starts[0], len(codes), dtype=np.int64).astype(np.uint8)
    places -= np.repeat(starts.astype(np.uint8), spans)
    values = tables.values.take(codes[starts[0] :])
    values *= tables.weights.take(places % np.uint8(_WEIGHTS))
    hashes = mix(np.add.reduceat(values, starts - starts[0]))
    return Words(starts, lengths, hashes, kinds[starts] == ALONE)


def is_digit(codes: np.ndarray) -> np.ndarray:
    """Which code points are decimal digits of any script, bool like codes."""
    return _tables().digits.take(codes)


def shingles(hashes: np.ndarray, size: int) -> np.ndarray:
    """Hashes of every `size` consecutive words, uint64 [words - size + 1].

    A text of fewer words, but not of none, is one shingle.
    """
    if not len(hashes):
        return hashes
    size = min(size, len(hashes))
    count = len(hashes) - size + 1
    total = np.zeros(count, dtype=np.uint64)
    weights = _tables().weights
    for place in range(size):
        total += hashes[place : place + count] * weights[place % _WEIGHTS]
    return mix(total)


def shingle_set(text: str, size: int) -> np.ndarray:
    """The text's different shingles, sorted, uint64."""
    return np.unique(shingles(split_words(text).hashes, size))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of two sorted sets; 1 for two empty ones."""
    if not len(a) and not len(b):
        return 1.0
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
