"""Recall at 1k to 128k tokens: what a state of constant size still holds, without a download.

Five suites: pairs of keys and values (MQAR), a pass key, a needle in its easy and its standard
form, and copying. All examples follow from the seed and the tokenizer.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.data.mqar import mqar_examples
from transnormer.data.tokenizers import Tokenizer, token_lengths
from transnormer.eval import metrics
from transnormer.eval.generation import generate_texts
from transnormer.eval.haystack import Haystack, needles, passkeys
from transnormer.eval.likelihood import (
    Progress,
    check_causal,
    evaluating,
    score_continuations,
    score_labels,
)
from transnormer.eval.metrics import Figure
from transnormer.eval.prompts import encode_requests
from transnormer.eval.scorer import TaskResult
from transnormer.infer.text import begin_id
from transnormer.models.decoder import Decoder
from transnormer.ops.cross_entropy import IGNORE_INDEX

LENGTHS = (1024, 4096, 16384)
SAMPLES = 20
SHORTEST = 64
# Keys, each asked for once.
_PAIRS = 8
# Of an answer to a needle: seven digits, and some words of politeness before them.
_ANSWER_TOKENS = 32
_WORD = re.compile(r"\w+")

Values = dict[str, list[float]]


class _Suite(NamedTuple):
    """How a suite is made and scored at one length: the figures of each example, by name."""

    summary: str
    score: Callable[[Decoder, Tokenizer, int, int, int, int], Values]


def evaluate_recall(
    model: Decoder,
    tokenizer: Tokenizer,
    name: str,
    *,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    rows: int = 8,
    progress: Progress | None = None,
) -> TaskResult:
    """Score a suite at several lengths.

    - ``mqar`` (Arora et al. 2023, arXiv:2312.04927): 8 random keys with their values, random tokens,
      then every key again; acc is the share of values that the model puts first.
    - ``copying`` (Jelassi et al. 2024, arXiv:2402.01032): random tokens twice; acc is the share of
      tokens of the second copy, but for its first, that the model puts first, and exact the share
      of copies without an error.
    - ``passkey``: acc is the share of keys of which every token is the likeliest.
    - ``needle_easy`` and ``needle_standard``: an answer of at most 32 tokens is generated greedily;
      its score is 2^((1 - n) / 2) if the number is its n-th word, so 1 if it is the first, and 0
      without it. acc is the share of answers that hold the number, and weighted_score the mean of
      the scores of the lengths with the lengths as weights, a geometric series where they double.
      Shen et al. 2024 (arXiv:2406.16690) weigh geometrically and have this penalty; which terms they
      weigh, and what n counts, is the reading of this package, so compare within it.

    Args:
        model: a causal decoder; it is left in the mode it was in.
        tokenizer: the model's; lengths count its tokens.
        name: of ``SUITES``.
        lengths: most tokens of an example, the question included.
        samples: examples a length; needles and pass keys lie at evenly spaced depths.
        seed: another seed, other examples.
        rows: examples that are read at once.
        progress: called with the number of examples just scored.

    Raises:
        ValueError: an unknown suite, a length too short for its question, numbers out of range, a
            model that is not causal.
    """
    check_causal(model)
    if name not in SUITES:
        raise ValueError(f"the suite is {name!r}; expected one of {', '.join(SUITES)}")
    if not lengths or min(lengths) < SHORTEST:
        raise ValueError(f"lengths is {list(lengths)}; expected numbers of at least {SHORTEST}")
    for option, value, least in (("samples", samples, 1), ("seed", seed, 0), ("rows", rows, 1)):
        if value < least:
            raise ValueError(f"{option} is {value}; expected at least {least}")
    of_length: dict[int, Values] = {}
    for length in sorted(set(lengths)):
        of_length[length] = SUITES[name].score(model, tokenizer, length, samples, seed, rows)
        if progress is not None:
            progress(samples)
    parts = {
        str(length): {figure: metrics.mean(values) for figure, values in found.items()}
        for length, found in of_length.items()
    }
    first = next(iter(of_length.values()))
    figures = {
        figure: metrics.mean([x for found in of_length.values() for x in found[figure]])
        for figure in first
    }
    if "score" in figures:
        figures["weighted_score"] = _weighted({k: parts[str(k)]["score"] for k in of_length})
    return TaskResult(samples * len(of_length), 0, figures, parts)


def _weighted(scores: dict[int, Figure]) -> Figure:
    """Mean of the lengths' scores with the lengths as weights."""
    total = sum(scores)
    value = sum(length * figure.value for length, figure in scores.items()) / total
    squares = [
        (length * figure.stderr) ** 2
        for length, figure in scores.items()
        if figure.stderr is not None
    ]
    # Every length has as many examples: all have an error, or none.
    return Figure(value, sum(squares) ** 0.5 / total if squares else None)


def graded(answer: str, number: str) -> float:
    """2^((1 - n) / 2) where the number is the n-th word of an answer, 0 where it is none of them."""
    words = _WORD.findall(answer)
    return 2.0 ** (-words.index(number) / 2.0) if number in words else 0.0


def _plain_ids(tokenizer: Tokenizer) -> Tensor:
    """The ids that stand for text: random tokens are drawn from these."""
    return torch.from_numpy(token_lengths(tokenizer).nonzero()[0])


def mqar_rows(
    tokenizer: Tokenizer, length: int, count: int, seed: int, first_id: int
) -> tuple[Tensor, Tensor]:
    """Rows of MQAR, int64 [count, <= length], and their labels, -100 where nothing is asked.

    The task is made at the length that the vocabulary allows; what is missing to a longer one are
    random tokens between the pairs and the first question.
    """
    plain = _plain_ids(tokenizer)
    seq = (length - 1) // 2 * 2
    block = min(seq, (len(plain) - 1) // 2 * 2)
    pairs = min(_PAIRS, block // 4)
    task = mqar_examples(count, seq=block, num_pairs=pairs, vocab_size=len(plain), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    between = torch.randint(len(plain), (count, seq - block), generator=generator)
    ids, labels = task.input_ids, task.labels
    context = 2 * pairs
    ids = torch.cat([ids[:, :context], between, ids[:, context:]], 1)
    nothing = torch.full_like(between, IGNORE_INDEX)
    labels = torch.cat([labels[:, :context], nothing, labels[:, context:]], 1)
    labels = torch.where(labels < 0, IGNORE_INDEX, plain[labels.clamp(min=0)])
    begin = torch.full((count, 1), first_id)
    return torch.cat([begin, plain[ids]], 1), torch.cat(
        [torch.full_like(begin, IGNORE_INDEX), labels], 1
    )


def copying_rows(
    tokenizer: Tokenizer, length: int, count: int, seed: int, first_id: int
) -> tuple[Tensor, Tensor]:
    """Random tokens twice, int64 [count, <= length], and the labels of the second copy.

    The first token of the copy is not asked for: nothing says yet that there will be one.
    """
    plain = _plain_ids(tokenizer)
    half = length // 2
    generator = torch.Generator().manual_seed(seed)
    tokens = plain[torch.randint(len(plain), (count, half), generator=generator)]
    begin = torch.full((count, 1), first_id)
    ids = torch.cat([begin, tokens, tokens[:, :-1]], 1)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, half + 1 :] = tokens[:, 1:]
    return ids, labels


def _hits(model: Decoder, ids: Tensor, labels: Tensor, rows: int) -> list[Tensor]:
    """For each row whether each of its labels is the likeliest token."""
    found = []
    with evaluating(model):
        for some, wanted in zip(ids.split(rows), labels.split(rows), strict=True):
            hits = score_labels(model, some, wanted)[1]
            found += [hit[asked] for hit, asked in zip(hits, wanted != IGNORE_INDEX, strict=True)]
    return found


def _score_mqar(
    model: Decoder, tokenizer: Tokenizer, length: int, count: int, seed: int, rows: int
) -> Values:
    ids, labels = mqar_rows(tokenizer, length, count, seed, begin_id(model, tokenizer))
    return {"acc": [hit.double().mean().item() for hit in _hits(model, ids, labels, rows)]}


def _score_copying(
    model: Decoder, tokenizer: Tokenizer, length: int, count: int, seed: int, rows: int
) -> Values:
    ids, labels = copying_rows(tokenizer, length, count, seed, begin_id(model, tokenizer))
    hits = _hits(model, ids, labels, rows)
    return {
        "acc": [hit.double().mean().item() for hit in hits],
        "exact": [float(hit.all()) for hit in hits],
    }


def _score_passkey(
    model: Decoder, tokenizer: Tokenizer, length: int, count: int, seed: int, rows: int
) -> Values:
    first_id = begin_id(model, tokenizer)
    texts = passkeys(tokenizer, length - 1, count, seed)
    requests = encode_requests(tokenizer, [(text.prompt, text.answer) for text in texts], first_id)
    scored = score_continuations(model, requests, rows=rows)
    return {"acc": [float(score.greedy) for score in scored]}


def _score_needle(
    name: str,
) -> Callable[[Decoder, Tokenizer, int, int, int, int], Values]:
    def score(
        model: Decoder, tokenizer: Tokenizer, length: int, count: int, seed: int, rows: int
    ) -> Values:
        texts: list[Haystack] = needles(tokenizer, name, length - 1, count, seed)
        answers = generate_texts(
            model,
            tokenizer,
            [text.prompt for text in texts],
            stop=("\n",),
            max_new_tokens=_ANSWER_TOKENS,
            rows=rows,
        )
        scores = [
            graded(answer, text.answer.strip()) for answer, text in zip(answers, texts, strict=True)
        ]
        return {"acc": [float(score > 0.0) for score in scores], "score": scores}

    return score


SUITES: dict[str, _Suite] = {
    "mqar": _Suite("values by their keys, random tokens", _score_mqar),
    "passkey": _Suite("a key of five digits among repeated sentences", _score_passkey),
    "needle_easy": _Suite("a question that was answered in the text", _score_needle("needle_easy")),
    "needle_standard": _Suite("a statement among others", _score_needle("needle_standard")),
    "copying": _Suite("random tokens, said again", _score_copying),
}
