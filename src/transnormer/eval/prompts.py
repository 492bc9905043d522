"""From texts to ids: examples before a question, and where a context ends."""

import random
from collections.abc import Sequence

from transnormer.data.tokenizers import Tokenizer
from transnormer.eval.tasks.items import BETWEEN, Answer, Item, Items, Page, Task


def encode_requests(
    tokenizer: Tokenizer, requests: Sequence[tuple[str, str]], first_id: int
) -> list[tuple[list[int], list[int]]]:
    """Ids of (context, continuation) pairs: of the context, behind first_id, and of the other.

    Both are encoded together and cut where the context alone ends; spaces at the end of the context
    go to the continuation. This is lm-evaluation-harness's rule, which its figures depend on.

    Raises:
        ValueError: nothing is left for a continuation.
    """
    contexts = [context.rstrip() for context, _ in requests]
    distinct = list(dict.fromkeys(contexts))
    ids_of = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in requests])
    pairs = []
    for (_, continuation), context, whole in zip(requests, contexts, wholes, strict=True):
        before = ids_of[context]
        if len(whole) <= len(before):
            raise ValueError(
                f"the continuation {continuation!r} has no token of its own after its context; "
                "expected at least one"
            )
        pairs.append(([first_id, *before], whole[len(before) :]))
    return pairs


class Shots:
    """Examples before each question, in the order and by the draws of lm-evaluation-harness.

    A task with examples of its own gives the first ones of the question's subject. Another one
    gives a draw from its questions, never the one that is asked: one more than wanted is drawn from
    ``random.Random(seed)`` for every question in turn, and the asked one is left out.

    Args:
        task: whose description comes first.
        items: all of them, not only those that are asked.
        count: examples.
        seed: of the draws.

    Raises:
        ValueError: a task whose items have no answers to show, or too few examples.
    """

    def __init__(self, task: Task, items: Items, count: int, seed: int) -> None:
        if count < 0:
            raise ValueError(f"num_fewshot is {count}; expected at least 0")
        if count and any(isinstance(item, Page | Answer) for item in items.test[:1]):
            raise ValueError(
                f"num_fewshot is {count}; expected 0 for {task.name}, whose documents have no "
                "examples before them"
            )
        pool = items.test if items.shots is None else items.shots
        if count and items.shots is None and len(pool) <= count:
            raise ValueError(
                f"num_fewshot is {count}; expected less than the {len(pool)} questions of "
                f"{task.name}, which the examples are drawn from"
            )
        self._task, self._items, self._count = task, items, count
        self._random = random.Random(seed)

    def before(self, item: Item) -> str:
        """The description and the examples before an item."""
        subject = getattr(item, "subject", "")
        text = self._task.describe(subject)
        if self._count:
            drawn = self._draw(item) if self._items.shots is None else self._first(subject)
            for shot in drawn:
                assert not isinstance(shot, Page | Answer)
                text += shot.example() + BETWEEN
        return text

    def _first(self, subject: str) -> Sequence[Item]:
        of_subject = [x for x in self._items.shots or () if getattr(x, "subject", "") == subject]
        if len(of_subject) < self._count:
            raise ValueError(
                f"num_fewshot is {self._count}; expected at most {len(of_subject)}, the examples "
                f"of {self._task.name} for {subject or 'its questions'}"
            )
        return of_subject[: self._count]

    def _draw(self, item: Item) -> Sequence[Item]:
        drawn = self._random.sample(self._items.test, self._count + 1)
        kept = [shot for shot in drawn if shot != item][: self._count]
        if len(kept) < self._count:
            # The question stands in the file more than once.
            others = [shot for shot in self._items.test if shot != item]
            kept = self._random.sample(others, self._count)
        return kept
