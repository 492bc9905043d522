"""Examinations by subject, answers by letter: MMLU, C-Eval and CMMLU from a user's copy.

A copy is one file of JSON lines (fields subject, split, question, choices or A to D, gold or
answer), or the folder of CSV files that the authors publish: ``dev/SUBJECT_dev.csv`` for examples
and ``test/`` or ``val/`` for what is scored (MMLU's without a header). Prompts, descriptions and
the order of examples are lm-evaluation-harness's (0.4.13).
"""

import csv
from collections.abc import Callable
from pathlib import Path

from transnormer.eval.tasks.items import Choices, Item, Items, Task
from transnormer.eval.tasks.records import Record, records
from transnormer.eval.tasks.subjects import CEVAL, CMMLU

_LETTERS = ("A", "B", "C", "D")
_EXAMPLES = "dev"


def _item(record: Record, subject: str, ask: str) -> Choices:
    question = next((name for name in ("question", "Question") if name in record), "question")
    if "choices" in record:
        choices = record.texts("choices")
    else:
        choices = tuple(record.text(letter) for letter in _LETTERS)
    answer = next((name for name in ("gold", "answer", "Answer") if name in record), "answer")
    if len(choices) != len(_LETTERS):
        raise ValueError(f"{record.where} has {len(choices)} choices; expected {len(_LETTERS)}")
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=True))
    text = f"{record.text(question).strip()}\n{lines}\n{ask}"
    return Choices(text, _LETTERS, record.index(answer, len(choices)), subject)


def _csv_records(path: Path) -> list[Record]:
    """Lines of a CSV file with a header, or of MMLU's six columns without one."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.reader(stream))
    if not rows:
        raise ValueError(f"{path} is empty; expected questions")
    names = ["question", *_LETTERS, "answer"]
    if "A" in rows[0] and "B" in rows[0]:
        names, rows = rows[0], rows[1:]
    found = []
    for number, row in enumerate(rows, start=1):
        if len(row) < len(names):
            raise ValueError(f"{path}, question {number}: {len(row)} of {len(names)} columns")
        found.append(Record(f"{path}, question {number}", dict(zip(names, row))))
    return found


def _reader(scored: tuple[str, ...], ask: str) -> Callable[[Path], Items]:
    """A reader of copies whose first split of ``scored`` that is there is scored."""

    def read(path: Path) -> Items:
        of_split: dict[str, list[Item]] = {}
        if path.is_dir():
            for split in (*scored, _EXAMPLES):
                for file in sorted((path / split).glob("*.csv")):
                    subject = file.stem.removesuffix(f"_{split}")
                    items = [_item(record, subject, ask) for record in _csv_records(file)]
                    of_split.setdefault(split, []).extend(items)
        else:
            for record in records(path):
                split = record.text("split") if "split" in record else scored[0]
                item = _item(record, record.text("subject"), ask)
                of_split.setdefault(split, []).append(item)
        split = next((split for split in scored if split in of_split), None)
        if split is None:
            raise ValueError(
                f"{path} has the splits {sorted(of_split)}; expected {' or '.join(scored)}, as a "
                "folder of CSV files or in the field split"
            )
        return Items(of_split[split], of_split.get(_EXAMPLES, []))

    return read


def _mmlu_description(subject: str) -> str:
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


def _ceval_description(subject: str) -> str:
    name = CEVAL.get(subject, subject)
    return f"以下是中国关于{name}的单项选择题，请选出其中的正确答案。\n\n"


def _cmmlu_description(subject: str) -> str:
    name = CMMLU.get(subject, subject)
    return f"以下是关于{name}的单项选择题，请直接给出正确答案的选项。\n\n"


TASKS = (
    Task(
        "mmlu",
        "57 subjects in English",
        ("mmlu", "mmlu.jsonl"),
        _reader(("test", "val"), "Answer:"),
        _mmlu_description,
    ),
    Task(
        "ceval",
        "52 subjects in Chinese, the validation split",
        ("ceval", "ceval.jsonl"),
        _reader(("val",), "答案："),
        _ceval_description,
    ),
    Task(
        "cmmlu",
        "67 subjects in Chinese",
        ("cmmlu", "cmmlu.jsonl", "nc/cmmlu.jsonl"),
        _reader(("test",), "答案："),
        _cmmlu_description,
    ),
)
