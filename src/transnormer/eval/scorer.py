"""The scorer: tasks from local files, with the figures of lm-evaluation-harness and without it."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transnormer.data.tokenizers import Tokenizer
from transnormer.eval import metrics
from transnormer.eval.generation import generate_texts
from transnormer.eval.likelihood import Likelihood, Progress, score_continuations
from transnormer.eval.metrics import Figure
from transnormer.eval.perplexity import checked, score_tokens
from transnormer.eval.prompts import Shots, encode_requests
from transnormer.eval.tasks import FILE_TASKS, Answer, Choices, Ending, Item, Page, find_data
from transnormer.infer.text import begin_id
from transnormer.models.decoder import Decoder

# lm-evaluation-harness's seed of the examples.
SHOT_SEED = 1234
# Tokens of a generated answer, as its default.
_ANSWER_TOKENS = 256
_ANSWER_END = "\n"
_SPACES = re.compile(r"\s+")


class TaskResult(NamedTuple):
    """What a task gave.

    Attributes:
        items: how many were scored.
        num_fewshot: examples before each.
        figures: by name, in the order of the report.
        parts: the figures of parts of the task (subjects, lengths), by name; may be empty.
    """

    items: int
    num_fewshot: int
    figures: dict[str, Figure]
    parts: dict[str, dict[str, Figure]] = {}

    def as_json(self) -> dict[str, Any]:
        """Plain values: name and name_stderr for each figure."""
        facts: dict[str, Any] = {"items": self.items, "num_fewshot": self.num_fewshot}
        facts |= _flat(self.figures)
        if self.parts:
            facts["parts"] = {name: _flat(figures) for name, figures in self.parts.items()}
        return facts


def _flat(figures: Mapping[str, Figure]) -> dict[str, float | None]:
    pairs: dict[str, float | None] = {}
    for name, figure in figures.items():
        pairs[name], pairs[f"{name}_stderr"] = figure.value, figure.stderr
    return pairs


def evaluate_task(
    model: Decoder,
    tokenizer: Tokenizer,
    name: str,
    *,
    data: Path | None = None,
    places: Mapping[str, Path] | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
    rows: int = 8,
    seed: int = SHOT_SEED,
    progress: Progress | None = None,
) -> TaskResult:
    """Score a task of local files.

    Figures by kind of item: acc, acc_norm (log-likelihood / characters) and acc_bytes (/ bytes) of
    choices, acc of schemas, perplexity and acc of last words, word_perplexity, byte_perplexity and
    bits_per_byte of documents, f1 or rouge of generated answers. They are those of
    lm-evaluation-harness 0.4.13 but for the standard error of perplexities, which it draws by
    bootstrap or leaves out, and which is computed here by the delta method.

    Args:
        model: a causal decoder; it is left in the mode it was in.
        tokenizer: the model's.
        name: of ``FILE_TASKS``.
        data, places: where the files lie, as ``find_data``'s.
        limit: score the first so many items; None scores all.
        num_fewshot: examples before each question.
        rows: states that a call works on.
        seed: of the draw of examples.
        progress: called with the number of requests just scored.

    Raises:
        ValueError: an unknown task, a file that is not its, no item, too many examples.
        FileNotFoundError: no file.
    """
    if name not in FILE_TASKS:
        raise ValueError(f"the task is {name!r}; expected one of {', '.join(sorted(FILE_TASKS))}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1, or None for all")
    task = FILE_TASKS[name]
    items = task.read(find_data(task, data, places))
    shots = Shots(task, items, num_fewshot, seed)
    asked = items.test[:limit]
    if not asked:
        raise ValueError(f"{name} has no questions; expected at least one")
    before = [shots.before(item) for item in asked]
    first_id = begin_id(model, tokenizer)
    if isinstance(asked[0], Page):
        pages = [item for item in asked if isinstance(item, Page)]
        figures = _page_figures(model, tokenizer, pages, first_id, rows)
        return TaskResult(len(asked), num_fewshot, figures)
    requests = [
        pair for item, text in zip(asked, before, strict=True) for pair in _requests(item, text)
    ]
    scored = iter(
        score_continuations(
            model, encode_requests(tokenizer, requests, first_id), rows=rows, progress=progress
        )
    )
    likelihoods = [[next(scored) for _ in _requests(item, "")] for item in asked]
    values = [_values(item, scores) for item, scores in zip(asked, likelihoods, strict=True)]
    _answer(model, tokenizer, asked, before, values, rows)
    parts = _by_subject(asked, values)
    return TaskResult(len(asked), num_fewshot, _figures(values), parts)


def _requests(item: Item, before: str) -> list[tuple[str, str]]:
    return [] if isinstance(item, Page) else item.requests(before)


def _values(item: Item, scores: Sequence[Likelihood]) -> dict[str, float]:
    """The figures of one item by name; those of a generated answer are still to come."""
    logprobs = np.array([score.logprob for score in scores])
    if isinstance(item, Ending):
        return {"perplexity": float(logprobs[0]), "acc": float(scores[0].greedy)}
    if isinstance(item, Answer):
        if not item.choices:
            return {}
        return {item.metric: nearness(item, item.choices[int(logprobs.argmax())])}
    assert not isinstance(item, Page)
    values = {"acc": float(logprobs.argmax() == item.gold)}
    if isinstance(item, Choices):
        characters = np.array([len(choice) for choice in item.choices])
        num_bytes = np.array([len(choice.encode()) for choice in item.choices])
        values["acc_norm"] = float((logprobs / characters).argmax() == item.gold)
        values["acc_bytes"] = float((logprobs / num_bytes).argmax() == item.gold)
    return values


def nearness(item: Answer, text: str) -> float:
    """F1 or ROUGE of an answer, as its item asks; one without a word counts as ``item.empty``."""
    measure: Callable[[str, Sequence[str]], float] = getattr(metrics, item.metric)
    return measure(text if text.strip() else item.empty, item.references)


def _answer(
    model: Decoder,
    tokenizer: Tokenizer,
    asked: Sequence[Item],
    before: Sequence[str],
    values: list[dict[str, float]],
    rows: int,
) -> None:
    """Generate the answers that are to be generated, and put their figures into values."""
    open_ones = [
        (place, item)
        for place, item in enumerate(asked)
        if isinstance(item, Answer) and not item.choices
    ]
    if not open_ones:
        return
    texts = generate_texts(
        model,
        tokenizer,
        [before[place] + item.context for place, item in open_ones],
        stop=(_ANSWER_END,),
        max_new_tokens=_ANSWER_TOKENS,
        rows=rows,
    )
    for (place, item), text in zip(open_ones, texts, strict=True):
        values[place][item.metric] = nearness(item, text)


def _figures(values: Sequence[dict[str, float]]) -> dict[str, Figure]:
    """Figures of items from those of each."""
    return {
        name: (metrics.perplexity if name == "perplexity" else metrics.mean)(
            [of_item[name] for of_item in values]
        )
        for name in values[0]
    }


def _by_subject(
    asked: Sequence[Item], values: Sequence[dict[str, float]]
) -> dict[str, dict[str, Figure]]:
    of_subject: dict[str, list[dict[str, float]]] = {}
    for item, of_item in zip(asked, values, strict=True):
        if isinstance(item, Choices) and item.subject:
            of_subject.setdefault(item.subject, []).append(of_item)
    return {subject: _figures(found) for subject, found in of_subject.items()}


def count_words(page: Page) -> int:
    """Words of a page's original; empty ones at its ends count, as in the harness."""
    return len(_SPACES.split(page.original))


def _page_figures(
    model: Decoder, tokenizer: Tokenizer, pages: Sequence[Page], first_id: int, rows: int
) -> dict[str, Figure]:
    documents = tokenizer.encode_batch([page.text for page in pages])
    scores = checked(score_tokens(model, documents, first_id=first_id, rows=rows))
    logprobs = [-score.nats for score in scores]
    words = [float(count_words(page)) for page in pages]
    num_bytes = [float(len(page.original.encode())) for page in pages]
    return {
        "word_perplexity": metrics.weighted_perplexity(logprobs, words),
        "byte_perplexity": metrics.weighted_perplexity(logprobs, num_bytes),
        "bits_per_byte": metrics.bits_per_byte(logprobs, num_bytes),
    }
