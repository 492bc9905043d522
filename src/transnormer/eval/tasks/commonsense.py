"""Questions with a few answers each: the zero-shot suites of language models.

Prompts are lm-evaluation-harness's (0.4.13). The files hold texts that were already put together
for another evaluation; what that one added is taken off again.
"""

import re
from collections.abc import Callable
from pathlib import Path

from transnormer.eval.tasks.items import Choices, Items, Schema, Task
from transnormer.eval.tasks.records import Record, records

_LETTERED = re.compile(r"^[A-Z]\. (.*)$", re.MULTILINE)
_BRACKETS = re.compile(r"\[.*?\]")


def _choices(record: Record, context: str, choices: tuple[str, ...] | None = None) -> Choices:
    choices = record.texts("choices") if choices is None else choices
    return Choices(context, choices, record.index("gold", len(choices)))


def _query(record: Record, begin: str = "", end: str = "") -> str:
    """The query without what it begins and ends with; ValueError where it does not."""
    query = record.text("query")
    if not (query.startswith(begin) and query.endswith(end)):
        raise ValueError(
            f"{record.where}: query is {query[:40]!r}...; expected one from {begin!r} to {end!r}"
        )
    return query.removeprefix(begin).removesuffix(end)


def _boolq(record: Record) -> Choices:
    return _choices(record, _query(record, "Passage: ") + "\nAnswer:")


def _piqa(record: Record) -> Choices:
    return _choices(record, "Question: " + _query(record, "Question: ", "\n") + "\nAnswer:")


def _siqa(record: Record) -> Choices:
    asked, _, answers = _query(record, "Context: ", "\nAnswer:").partition("\nChoices:\n")
    context, _, question = asked.partition("\nQuestion: ")
    choices = tuple(_LETTERED.findall(answers))
    return _choices(record, f"Q: {context} {question}\nA:", choices)


def _hellaswag(record: Record) -> Choices:
    """The harness capitalises the fragment that the endings go on from; the file has it as it was.

    The fragment is what follows the last sentence, where that begins with a small letter.
    """
    query = record.text("query")
    head, dot, tail = query.rpartition(". ")
    if dot and tail[:1].islower() and not tail.endswith((".", "!", "?")):
        query = head + dot + tail.capitalize()
    choices = tuple(_cleaned(choice) for choice in record.texts("choices"))
    if not all(choices):
        raise ValueError(
            f"{record.where}: choices[{choices.index('')}] is nothing but marks; expected some text; "
            "leave the line out"
        )
    return _choices(record, _cleaned(query), choices)


def _cleaned(text: str) -> str:
    """Without the marks of WikiHow's pages."""
    text = _BRACKETS.sub("", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _arc(record: Record) -> Choices:
    return _choices(record, "Question: " + _query(record, "Question: ") + "\nAnswer:")


def _openbookqa(record: Record) -> Choices:
    return _choices(record, _query(record))


def _copa(record: Record) -> Choices:
    """The harness's choices begin with a space, and its delimiter is one more."""
    premise, _, connector = _query(record).rpartition(", ")
    choices = tuple(f" {choice}" for choice in record.texts("choices"))
    return _choices(record, f"{premise} {connector}", choices)


def _commonsense_qa(record: Record) -> Choices:
    question, _, answers = _query(record).partition("\nChoices:\n")
    return _choices(record, f"{question}\n{answers}")


def _schema(record: Record) -> Schema:
    contexts = record.texts("context_options")
    return Schema(contexts, record.text("continuation"), record.index("gold", len(contexts)))


def _spaced_schema(record: Record) -> Schema:
    """What follows the pronoun begins with its space, before which the delimiter stands too."""
    schema = _schema(record)
    words = schema.continuation[:1].isalnum()
    return schema._replace(continuation=" " + schema.continuation) if words else schema


def _reader(item: Callable[[Record], Choices | Schema]) -> Callable[[Path], Items]:
    return lambda path: Items([item(record) for record in records(path)])


TASKS = (
    Task("boolq", "yes or no, from a passage", ("boolq.jsonl",), _reader(_boolq)),
    Task("piqa", "physical common sense", ("piqa.jsonl",), _reader(_piqa)),
    Task("siqa", "social common sense", ("siqa.jsonl",), _reader(_siqa)),
    Task(
        "hellaswag",
        "how a description goes on",
        ("hellaswag_val.jsonl", "hellaswag.jsonl"),
        _reader(_hellaswag),
    ),
    Task(
        "winogrande",
        "what a pronoun stands for",
        ("winogrande_xl_val.jsonl", "winogrande.jsonl"),
        _reader(_schema),
    ),
    Task(
        "wsc273",
        "what a pronoun stands for, the 273 schemas",
        ("winograd_wsc273.jsonl", "wsc273.jsonl"),
        _reader(_spaced_schema),
    ),
    Task("arc_easy", "science questions of schools", ("arc_easy.jsonl",), _reader(_arc)),
    Task("arc_challenge", "the harder science questions", ("arc_challenge.jsonl",), _reader(_arc)),
    Task("openbookqa", "elementary science", ("openbookqa.jsonl",), _reader(_openbookqa)),
    Task("copa", "causes and effects", ("copa.jsonl",), _reader(_copa)),
    Task(
        "commonsense_qa",
        "common sense, answers by letter",
        ("commonsense_qa.jsonl",),
        _reader(_commonsense_qa),
    ),
)
