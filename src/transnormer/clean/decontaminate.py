"""Dropping documents that hold texts of evaluation sets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transnormer.clean.arrays import save_arrays
from transnormer.clean.config import DecontaminateConfig
from transnormer.clean.item import Item
from transnormer.clean.rules.quality import Measures
from transnormer.clean.steps import ItemStep
from transnormer.clean.words import shingles, split_words


class _Phrases(NamedTuple):
    """The phrases of one length: sorted hashes, and the number of the text each is from."""

    hashes: np.ndarray
    owners: np.ndarray


def save_phrases(config: DecontaminateConfig, path: Path) -> None:
    """Write the n-grams of the evaluation sets to an .npz file.

    Raises FileNotFoundError where nothing matches, ValueError for files that cannot be read.
    """
    found: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    names: list[str] = []
    for name, text in _texts(config.path):
        hashes = split_words(text).hashes
        if len(hashes) < config.min_words:
            continue
        size = min(config.ngram, len(hashes))
        grams = shingles(hashes, size)
        lists = found.setdefault(size, ([], []))
        lists[0].append(grams)
        lists[1].append(np.full(len(grams), len(names), dtype=np.int64))
        names.append(name)
    arrays: dict[str, np.ndarray] = {"names": np.array(names, dtype=np.str_)}
    for size, (grams, owners) in found.items():
        hashes, first = np.unique(np.concatenate(grams), return_index=True)
        arrays[f"hashes_{size}"] = hashes
        arrays[f"owners_{size}"] = np.concatenate(owners)[first]
    save_arrays(path, **arrays)


def _texts(pattern: str) -> Iterator[tuple[str, str]]:
    """Every text of the evaluation files with its name: file:line, or the file."""
    # Here, since the room brings torch, which no task needs.
    from transnormer.data.documents import TEXT_SUFFIXES, find_files, read_documents, read_records

    for path in find_files(pattern, name="decontaminate.path"):
        suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() in TEXT_SUFFIXES]
        if suffixes[-1:] == [".jsonl"]:
            for where, record in read_records(path):
                for text in _strings(record):
                    yield where, text
        else:
            for document in read_documents(str(path), name="decontaminate.path"):
                yield document.id, document.text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


class DropContaminated(ItemStep):
    """Drops a document that shares an n-gram with an evaluation text, and names the text."""

    name = "decontaminate"

    def __init__(self, path: Path) -> None:
        """path: what save_phrases wrote; it is read when the first document comes."""
        super().__init__()
        self._path = path
        self._phrases: dict[int, _Phrases] | None = None
        self._names: np.ndarray = np.zeros(0, dtype=np.str_)

    def apply(self, item: Item) -> None:
        """Drop the item if any phrase stands in it."""
        phrases = self._load() if self._phrases is None else self._phrases
        measures = item.measures or Measures(item.text)
        hits: set[str] = set()
        for size, (hashes, owners) in phrases.items():
            if measures.num_words < size:
                continue
            grams = shingles(measures.words.hashes, size)
            places = np.minimum(np.searchsorted(hashes, grams), len(hashes) - 1)
            found = places[hashes[places] == grams]
            hits.update(str(name) for name in self._names[owners[found]])
        if hits:
            item.drop("decontaminate", "evaluation", hits=sorted(hits)[:20], num_hits=len(hits))

    def _load(self) -> dict[int, _Phrases]:
        with np.load(self._path, allow_pickle=False) as data:
            self._names = data["names"]
            sizes = [int(name.split("_")[1]) for name in data if name.startswith("hashes_")]
            self._phrases = {
                size: _Phrases(data[f"hashes_{size}"], data[f"owners_{size}"]) for size in sizes
            }
        return self._phrases
