"""Instructions out of a corpus: definitions from a dictionary, questions from manuals' headings.

Reads corpus files whose lines hold text, source and group, and writes train.jsonl and heldout.jsonl
(instructions), and base.jsonl (the plain text of the same training documents, for a small base
model). The last line printed is one JSON object.
"""

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DICTIONARY = "wordnet_glosses"
MANUALS = {
    "postgresql_doc": "PostgreSQL",
    "libreoffice_help": "LibreOffice",
    "gnome_help": "GNOME",
    "powershell_docs": "PowerShell",
    "debian_handbook": "Debian",
    "debian_install_guide": "Debian",
    "debian_policy": "Debian",
    "debian_devref": "Debian",
    "debian_harden": "Debian",
}
_GLOSS = re.compile(r"(?P<words>.+?) \((?P<part>noun|verb|adjective|adverb)\): (?P<gloss>.+)")
_HEADING = re.compile(r"#{1,6} (?:[A-Z]?[\d.]+\.? |Chapter \d+\. )?(?P<title>.+)")
# What a paragraph of prose looks like: it begins with a letter and ends a sentence.
_PROSE = re.compile(r"[A-Z][^\n|]*[.!?]")
_SHORTEST, _LONGEST = 40, 400


def documents(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a corpus file."""
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def definitions(document: dict[str, Any]) -> Iterator[dict[str, str]]:
    """An instruction for the first gloss of every word that heads one."""
    seen = set()
    for line in document["text"].splitlines():
        found = _GLOSS.fullmatch(line)
        if found is None:
            continue
        word, part = found["words"].split(", ")[0], found["part"]
        gloss = found["gloss"].split('; "')[0]
        if (word, part) not in seen and len(gloss) <= _LONGEST:
            seen.add((word, part))
            question = f'Define the {part} "{word}".'
            yield {"instruction": question, "output": f"{word} ({part}): {gloss}"}


def sections(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Headings of a manual with the first paragraph under them, where that is prose."""
    blocks = document["text"].split("\n\n")
    for block, following in zip(blocks, blocks[1:]):
        found = _HEADING.fullmatch(block.strip())
        text = " ".join(following.split())
        if found and _SHORTEST <= len(text) <= _LONGEST and _PROSE.fullmatch(text):
            yield found["title"].strip(), text


def questions(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Conversations about the sections of a manual, two sections in one where there are two."""
    name, found = MANUALS[document["source"]], list(sections(document))
    for first in range(0, len(found), 2):
        messages = []
        for place, (title, text) in enumerate(found[first : first + 2]):
            asked = f'And about "{title}"?'
            if place == 0:
                asked = f'What does the {name} manual say about "{title}"?'
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": text},
            ]
        yield {"messages": messages}


def question_of(row: dict[str, Any]) -> str:
    """What is asked first."""
    return row.get("instruction") or row["messages"][0]["content"]


def collect(path: Path, most: dict[str, int], seed: int) -> list[dict[str, Any]]:
    """At most so many instructions of each kind, each with the group of its document."""
    found: dict[str, list[dict[str, Any]]] = {"definitions": [], "manuals": []}
    for document in documents(path):
        if document["source"] == DICTIONARY:
            rows = [{**row, "group": document["group"]} for row in definitions(document)]
            found["definitions"] += rows
        elif document["source"] in MANUALS:
            found["manuals"] += [{**row, "group": document["group"]} for row in questions(document)]
    order = random.Random(seed)
    rows = []
    for kind, some in found.items():
        order.shuffle(some)
        rows += some[: most[kind]]
    order.shuffle(rows)
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """One JSON object a line."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Make the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path, help="corpus file for training, .jsonl.xz")
    parser.add_argument("heldout", type=Path, help="corpus file of other groups, .jsonl.xz")
    parser.add_argument("directory", type=Path, help="where to write")
    parser.add_argument("--definitions", type=int, default=12_000)
    parser.add_argument("--manuals", type=int, default=3_000)
    parser.add_argument("--heldout-definitions", type=int, default=300)
    parser.add_argument("--heldout-manuals", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    most = {"definitions": given.definitions, "manuals": given.manuals}
    train = collect(given.train, most, given.seed)
    asked = {question_of(row) for row in train}
    groups = {row["group"] for row in train}
    # More than wanted, since some are left out.
    heldout = collect(given.heldout, {"definitions": 10**9, "manuals": 10**9}, given.seed)
    known = [row for row in heldout if question_of(row) in asked]
    heldout = [row for row in heldout if question_of(row) not in asked]
    shared = groups & {row["group"] for row in heldout}
    if shared:
        raise ValueError(f"group {min(shared)} is in both files; expected groups of one file each")
    some = [row for row in heldout if "instruction" in row][: given.heldout_definitions]
    some += [row for row in heldout if "messages" in row][: given.heldout_manuals]
    given.directory.mkdir(parents=True, exist_ok=True)
    write(train, given.directory / "train.jsonl")
    write(some, given.directory / "heldout.jsonl")
    wanted = {DICTIONARY, *MANUALS}
    plain = [{"text": x["text"]} for x in documents(given.train) if x["source"] in wanted]
    write(plain, given.directory / "base.jsonl")
    facts = {
        "train": len(train),
        "train_definitions": sum("instruction" in row for row in train),
        "heldout": len(some),
        "heldout_left_out_since_asked_in_training": len(known),
        "base_documents": len(plain),
        "base_bytes": sum(len(row["text"].encode()) for row in plain),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
