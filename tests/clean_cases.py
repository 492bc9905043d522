"""Small corpora and configurations for the tests of corpus cleaning."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transnormer.clean.config import CleanConfig, make_clean_config
from transnormer.clean.pipeline import clean_corpus

_SYLLABLES = [a + b for a in "bcdfglmnprstvwzk" for b in "aeiou"]


def prose(seed: int, words: int = 120) -> str:
    """Text that no rule minds: sentences of made-up words, a few lines."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(400)]
    vocabulary += ["the", "of", "and", "to", "that", "with"] * 20
    sentences = []
    while words > 0:
        length = min(words, rng.randint(6, 14))
        sentences.append(" ".join(rng.choices(vocabulary, k=length)).capitalize() + ".")
        words -= length
    return "\n".join(sentences)


def edited(text: str, seed: int, changes: int) -> str:
    """The text with so many of its words replaced."""
    rng = random.Random(seed)
    lines = [line.split(" ") for line in text.split("\n")]
    places = [(row, column) for row, line in enumerate(lines) for column in range(len(line))]
    for row, column in rng.sample(places, changes):
        lines[row][column] = f"other{rng.randrange(10**6)}"
    return "\n".join(" ".join(line) for line in lines)


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(directory: Path) -> list[dict[str, Any]]:
    """All records of all files of a directory, in the order of the files' names."""
    return [
        json.loads(line)
        for path in sorted(directory.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def configure(source: Path, target: Path, **tables: Any) -> CleanConfig:
    """A configuration of one worker; tables replace or add keys."""
    given = {name: value for name, value in tables.items() if name not in ("input", "executor")}
    return make_clean_config(
        {
            "input": {"path": str(source), **tables.get("input", {})},
            "output": {"dir": str(target)},
            "executor": {"workers": 1, **tables.get("executor", {})},
            **given,
        }
    )


def run_clean(source: Path, target: Path, **tables: Any) -> dict[str, Any]:
    """Clean a path into a directory and return the report."""
    report = clean_corpus(configure(source, target, **tables))
    assert report is not None
    return report


def where_ids_went(target: Path) -> dict[str, str]:
    """For each id the directory that holds it; fails where one is in two places."""
    found: dict[str, str] = {}
    for name in ("clean", "dropped", "quarantined"):
        for record in read_lines(target / name):
            assert record["id"] not in found, record["id"]
            found[record["id"]] = name
    return found


_PARTS = tuple([f"{a}{b}{c}" for a in "bdgkt" for b in "aeo"] for c in ("n", "r", "l", "s", "m"))


def grammar(seed: int, sentences: int = 25) -> str:
    """Text whose words stand in an order: each of five kinds follows another, with favourites."""
    rng = random.Random(seed)
    lines = []
    for _ in range(sentences):
        words, last = [], rng.randrange(15)
        for kind in (0, 1, 2, 3, 4, 1, 2):
            # The word before chooses among three.
            last = (3 * last + kind + rng.randrange(3)) % 15
            words.append(_PARTS[kind][last])
        lines.append(" ".join(words).capitalize() + ".")
    return "\n".join(lines)


def shuffled(text: str, seed: int) -> str:
    """The words of a text in another order."""
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)
