"""Figures of evaluations with their standard errors, and how near a text is to a reference."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_WORD = re.compile(r"[^a-z0-9]+")


class Figure(NamedTuple):
    """A figure and its standard error; None where one item gives no error."""

    value: float
    stderr: float | None


def mean(values: Sequence[float]) -> Figure:
    """Mean, and sample deviation / sqrt(n)."""
    average = sum(values) / len(values)
    if len(values) < 2:
        return Figure(average, None)
    variance = sum((x - average) ** 2 for x in values) / (len(values) - 1)
    return Figure(average, math.sqrt(variance / len(values)))


def perplexity(logprobs: Sequence[float]) -> Figure:
    """exp(-mean), and its standard error by the delta method: perplexity * error of the mean."""
    average = mean(logprobs)
    return _exponential(Figure(-average.value, average.stderr))


def weighted_perplexity(logprobs: Sequence[float], weights: Sequence[float]) -> Figure:
    """exp(-sum of logprobs / sum of weights): word and byte perplexity."""
    return _exponential(_ratio(logprobs, weights))


def bits_per_byte(logprobs: Sequence[float], num_bytes: Sequence[float]) -> Figure:
    """-sum of logprobs / sum of bytes / ln 2."""
    ratio = _ratio(logprobs, num_bytes)
    error = None if ratio.stderr is None else ratio.stderr / math.log(2.0)
    return Figure(ratio.value / math.log(2.0), error)


def _exponential(figure: Figure) -> Figure:
    # A perplexity beyond the numbers of float is infinite, not a failure of the run.
    value = math.exp(figure.value) if figure.value < 700.0 else math.inf
    return Figure(value, None if figure.stderr is None else value * figure.stderr)


def _ratio(logprobs: Sequence[float], weights: Sequence[float]) -> Figure:
    """-sum / sum, and the standard error of a ratio of sums over documents (linearised)."""
    count, total = len(logprobs), sum(weights)
    ratio = -sum(logprobs) / total
    if count < 2:
        return Figure(ratio, None)
    squares = sum((x + ratio * w) ** 2 for x, w in zip(logprobs, weights, strict=True))
    return Figure(ratio, math.sqrt(squares * count / (count - 1)) / total)


def normalized(text: str) -> str:
    """Small letters without punctuation, articles and runs of spaces, as SQuAD compares answers.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, its evaluation script.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, 0 to 100, of the nearest reference."""
    words = normalized(prediction).split()
    return max(_overlap_f(words, normalized(reference).split()) for reference in references)


def rouge(prediction: str, references: Sequence[str]) -> float:
    """Geometric mean of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 100, each of its nearest reference.

    Words are runs of letters and digits, without stemming (Lin 2004; the mean is SCROLLS's).
    """
    scores = rouge_scores(prediction, references)
    return math.prod(scores) ** (1.0 / len(scores))


def rouge_scores(prediction: str, references: Sequence[str]) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, F measures from 0 to 100."""
    words = _words(prediction)

    def best(score: Callable[[list[str], list[str]], float]) -> float:
        return max(score(words, _words(reference)) for reference in references)

    return (
        best(_overlap_f),
        best(lambda a, b: _overlap_f(list(zip(a, a[1:])), list(zip(b, b[1:])))),
        best(_subsequence_f),
    )


def _words(text: str) -> list[str]:
    return [word for word in _NO_WORD.split(text.lower()) if word]


def _overlap_f(predicted: Sequence[object], reference: Sequence[object]) -> float:
    """F measure of two bags; two empty ones do not agree."""
    common = sum((Counter(predicted) & Counter(reference)).values())
    return _f(common, len(predicted), len(reference))


def _subsequence_f(predicted: list[str], reference: list[str]) -> float:
    """F measure of the longest common subsequence."""
    row = [0] * (len(reference) + 1)
    for word in predicted:
        corner = 0
        for place, other in enumerate(reference, start=1):
            above = row[place]
            row[place] = corner + 1 if word == other else max(above, row[place - 1])
            corner = above
    return _f(row[-1], len(predicted), len(reference))


def _f(common: int, predicted: int, reference: int) -> float:
    return 200.0 * common / (predicted + reference) if common else 0.0
