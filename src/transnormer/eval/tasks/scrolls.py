"""SCROLLS (Shaham et al. 2022, arXiv:2201.03533): questions about long documents, zero-shot.

A copy is what the authors publish: one folder a task with ``validation.jsonl``, lines of id, input
and output; lines of one id are references of one question. Prompts, splits of the input and the
choice of metric are lm-evaluation-harness's (0.4.13).
"""

import re
from collections.abc import Callable
from pathlib import Path

from transnormer.eval.metrics import normalized
from transnormer.eval.tasks.items import Answer, Choices, Item, Items, Task
from transnormer.eval.tasks.records import find_file, records

_OPTION = re.compile(r" *\([A-D]\) *")
_VERDICTS = ("Not mentioned", "Entailment", "Contradiction")
_YES_NO = ("yes", "no")


def _inputs(path: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """(id, input, references) of each question, in the order of the file."""
    if path.is_dir():
        file = find_file(path, ("validation.jsonl",))
        if file is None:
            raise FileNotFoundError(f"{path} holds no validation.jsonl; expected one")
        path = file
    found: dict[str, tuple[str, list[str]]] = {}
    for record in records(path):
        text, output = record.text("input"), record.text("output")
        found.setdefault(record.text("id"), (text, []))[1].append(output)
    return [(name, text, tuple(outputs)) for name, (text, outputs) in found.items()]


def _parted(text: str) -> tuple[str, str]:
    """The question, which stands before the first empty line, and the document."""
    question, _, document = text.partition("\n\n")
    return question, document


def _asked(document: str, question: str) -> str:
    return f"{document}\n\nQuestion: {question}\nAnswer:"


def _qasper(text: str, outputs: tuple[str, ...]) -> Item:
    question, document = _parted(text)
    asked_yes_or_no = all(normalized(output) in _YES_NO for output in outputs)
    return Answer(
        _asked(document, question),
        outputs,
        choices=_YES_NO if asked_yes_or_no else (),
        empty="Unanswerable",
    )


def _question(text: str, outputs: tuple[str, ...]) -> Item:
    question, document = _parted(text)
    return Answer(_asked(document, question), outputs)


def _summary(text: str, outputs: tuple[str, ...]) -> Item:
    question = "What is a summary of the preceding text?"
    return Answer(_asked(text, question), outputs, metric="rouge")


def _contract_nli(text: str, outputs: tuple[str, ...]) -> Item:
    hypothesis, document = _parted(text)
    context = f"{document}\n\nHypothesis: {hypothesis}\nConclusion:"
    return Choices(context, _VERDICTS, _VERDICTS.index(outputs[0]))


def _quality(text: str, outputs: tuple[str, ...]) -> Item:
    question, rest = _parted(text)
    cut = rest.find("\n\n", rest.find("(D)"))
    choices = tuple(" ".join(part.split()) for part in _OPTION.split(rest[:cut])[1:])
    gold = choices.index(" ".join(outputs[0].split()))
    return Choices(_asked(rest[cut:].strip(), question), choices, gold)


def _reader(item: Callable[[str, tuple[str, ...]], Item]) -> Callable[[Path], Items]:
    def read(path: Path) -> Items:
        items = []
        for name, text, outputs in _inputs(path):
            try:
                items.append(item(text, outputs))
            except ValueError as error:
                raise ValueError(
                    f"{path}: the answer of {name} is {outputs[0]!r}; expected one of its choices"
                ) from error
        return Items(items)

    return read


def _task(name: str, summary: str, item: Callable[[str, tuple[str, ...]], Item]) -> Task:
    places = (f"scrolls/{name}", name, f"{name}.jsonl")
    return Task(f"scrolls_{name}", summary, places, _reader(item))


TASKS = (
    _task("qasper", "questions on papers, F1", _qasper),
    _task("narrative_qa", "questions on books and scripts, F1", _question),
    _task("quality", "questions on stories, four choices", _quality),
    _task("contract_nli", "what follows from a contract, three choices", _contract_nli),
    _task("gov_report", "summaries of reports, ROUGE", _summary),
    _task("summ_screen_fd", "summaries of screenplays, ROUGE", _summary),
    _task("qmsum", "summaries of meetings by question, ROUGE", _summary),
)
