"""The n-gram scorer against its formulas, and what it tells apart."""

import math
import random
from collections import Counter

import pytest
from clean_cases import grammar, shuffled
from tolerances import SMOOTHED_BITS

from transnormer.clean.selfclean.ngram import NgramScorer


def test_bits_follow_the_formula() -> None:
    training, text, strength = b"abracadabra abracadabra", b"cabra zab", 4.0
    grams = [Counter(training[i : i + n] for i in range(len(training) - n + 1)) for n in (1, 2, 3)]
    bits = 0.0
    for place in range(len(text)):
        p = 1 / 256
        for n in (1, 2, 3):
            gram = text[max(0, place - n + 1) : place + 1]
            context = len(training) if n == 1 else grams[n - 2][gram[:-1]]
            if len(gram) < n:
                # The start of a text has shorter runs, which training saw at its own start only.
                own = training.startswith(gram)
                p = (own + strength * p) / (
                    training.startswith(gram[:-1]) * bool(gram[:-1]) + strength
                )
            else:
                p = (grams[n - 1][gram] + strength * p) / (context + strength)
        bits -= math.log2(p)
    scorer = NgramScorer(3, strength=strength).fit([training.decode()])
    found = scorer.score([text.decode()])[0].bits_per_byte
    assert found == pytest.approx(bits / len(text), rel=SMOOTHED_BITS)


def test_shuffled_words_gain_nothing_from_context() -> None:
    scorer = NgramScorer(5, table_bits=18).fit(grammar(n) for n in range(150))
    good = [scores.context_gain for scores in scorer.score([grammar(n) for n in range(200, 220)])]
    bad = [
        scores.context_gain
        for scores in scorer.score([shuffled(grammar(n), n) for n in range(200, 220)])
    ]
    assert min(good) > max(bad)


def test_strange_letters_cost_bits() -> None:
    scorer = NgramScorer(5, table_bits=18).fit(grammar(n) for n in range(100))
    rng = random.Random(1)
    text = grammar(300)
    noisy = "".join(rng.choice("qxzjk") if rng.random() < 0.2 else char for char in text)
    clean, dirty = scorer.score([text, noisy])
    assert dirty.bits_per_byte > 1.5 * clean.bits_per_byte


def test_fitting_in_parts_changes_nothing() -> None:
    texts = [grammar(n) for n in range(20)]
    whole = NgramScorer(4, table_bits=16).fit(texts)
    parts = NgramScorer(4, table_bits=16)
    parts.fit(texts)
    assert whole.score([grammar(50)]) == parts.score([grammar(50)])


def test_nothing_is_scored_as_nothing() -> None:
    assert NgramScorer(3).fit(["abc"]).score(["", "!"])[0] == (0.0, 0.0)
    assert NgramScorer(3).score(["abc"])[0] == (0.0, 0.0)


def test_a_text_shorter_than_the_longest_run_is_scored() -> None:
    scorer = NgramScorer(6, table_bits=12).fit([grammar(1)])
    assert all(score.bits_per_byte > 0 for score in scorer.score(["a", "abc", "abcd"]))
