"""What tasks are made of: one kind of item for each way of asking a language model.

Prompts follow lm-evaluation-harness 0.4.13, whose texts the files of ``lm_eval_tasks`` pass on: an
example is the question, a space and the answer, and two line ends stand between examples.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DELIMITER = " "
BETWEEN = "\n\n"


class Choices(NamedTuple):
    """A question and answers of which one is right; the likeliest is the model's.

    Attributes:
        context: the question.
        choices: the answers; a space is put before each.
        gold: index of the right one.
        subject: what the question is about; examples are taken from the same.
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    subject: str = ""

    def example(self) -> str:
        """The question with its answer."""
        return self.context + DELIMITER + self.choices[self.gold]

    def requests(self, before: str = "") -> list[tuple[str, str]]:
        """What is scored, (context, continuation), behind a text."""
        return [(before + self.context, DELIMITER + choice) for choice in self.choices]


class Schema(NamedTuple):
    """A sentence with a blank: what follows is scored after each way to fill it.

    Partial evaluation of Trinh & Le 2018 (arXiv:1806.02847).
    """

    contexts: tuple[str, ...]
    continuation: str
    gold: int

    def example(self) -> str:
        """The sentence, filled rightly."""
        return self.contexts[self.gold] + DELIMITER + self.continuation

    def requests(self, before: str = "") -> list[tuple[str, str]]:
        """What is scored, (context, continuation), behind a text."""
        return [(before + context, DELIMITER + self.continuation) for context in self.contexts]


class Ending(NamedTuple):
    """A text and its end, which is to be the likeliest; the end brings its own space."""

    context: str
    ending: str

    def example(self) -> str:
        """The whole text; with the delimiter of all examples, so two spaces stand in it."""
        return self.context + DELIMITER + self.ending

    def requests(self, before: str = "") -> list[tuple[str, str]]:
        """What is scored, (context, continuation), behind a text."""
        return [(before + self.context, self.ending)]


class Page(NamedTuple):
    """A document to be predicted whole.

    Attributes:
        text: what the model reads.
        original: what words and bytes are counted of.
    """

    text: str
    original: str


class Answer(NamedTuple):
    """A question that is answered by greedy generation, up to the first line end.

    Attributes:
        context: what comes before the answer.
        references: right answers; the nearest counts.
        metric: "f1" or "rouge", of ``eval.metrics``.
        choices: where there are some, the likeliest is the answer and nothing is generated.
        empty: what an answer without a word means.
    """

    context: str
    references: tuple[str, ...]
    metric: str = "f1"
    choices: tuple[str, ...] = ()
    empty: str = ""

    def requests(self, before: str = "") -> list[tuple[str, str]]:
        """What is scored, (context, continuation), behind a text; nothing without choices."""
        return [(before + self.context, DELIMITER + choice) for choice in self.choices]


Item = Choices | Schema | Ending | Page | Answer


class Items(NamedTuple):
    """The items of a task.

    Attributes:
        test: what is scored.
        shots: what the first few of each subject are the examples of; None draws examples from
            test, never the item itself.
    """

    test: list[Item]
    shots: list[Item] | None = None


class Task(NamedTuple):
    """A task that reads local files.

    Attributes:
        name: on the command line.
        summary: one line.
        files: names below the data directory, tried in this order.
        read: items of a file or directory.
        describe: the text before all examples, of a subject.
    """

    name: str
    summary: str
    files: tuple[str, ...]
    read: Callable[[Path], Items]
    describe: Callable[[str], str] = lambda subject: ""
